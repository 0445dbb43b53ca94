"""A run's folder: locked by one process, with states saved at intervals for resuming after any interruption."""

import errno
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from dhbe import files, state_file
from dhbe.errors import Failed, Interrupted, Refused, out_of_memory
from dhbe.foreign import name

RECORD = "record.json"
REPORT = "report.html"
CHECKPOINT = Path("checkpoint") / "state.pt"
STAGE = Path("checkpoint") / "results"
"""Staging folder, so that old results are replaced only when the new ones are complete."""
LOCK = ".lock"
PLANTED = "victim"
"""Folder inside a demo's, with the model that it plants."""
STOPS = (signal.SIGINT, signal.SIGTERM)
TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
"""Names of temporary files of `files.write`; a killed process leaves one behind."""


class Run:
    """A folder locked by this process, and the state of the run in it.

    Attributes:
        folder: Folder of the results.
        every: Seconds between two saved states.
        finished: Whether the folder holds the results of a finished run, so that nothing is left to do.
        saved: The state that the interrupted run saved last; None for a fresh run.
        asked: Number of requests to stop that the answering thread has seen.
        stopping: Whether a request to stop has reached the main thread.
        at_once: Whether a request to stop raises KeyboardInterrupt immediately, as nothing worth saving would be lost.
        restored: The file of the state that this run resumes from, until the run has shown that it can.
    """

    def __init__(
        self,
        folder: Path,
        settings: str,
        saved: dict[str, Any] | None,
        finished: bool,
        every: float,
        replaces: str,
        results: Iterable[str],
        command: str | None = None,
    ) -> None:
        self.folder = folder
        self.saved = saved
        self.finished = finished
        self.asked = 0
        self.stopping = False
        self.at_once = False
        self.restored = folder / CHECKPOINT if saved and not finished else None
        self._settings = settings
        self._command = command
        self.every = every
        self._replaces = replaces
        self._results = (REPORT, *results)
        self._last = time.monotonic()

    def keep(self, state: Callable[[], dict[str, Any]], *, last: bool = False) -> bool:
        """Saves the state if the interval is over, if it is the `last` one, or if the run was asked to stop.

        Returns:
            Whether the state was saved.

        Raises:
            Interrupted: The run was asked to stop; the state is saved.
            Failed: The state could not be saved.
        """
        if due := last or self.stopping or time.monotonic() - self._last >= self.every:
            state_file.write(
                self.folder / CHECKPOINT,
                self._settings,
                {"replaces": self._replaces, "command": self._command, **state()},
            )
            self._last = time.monotonic()
        if self.stopping:
            raise self.interrupted()
        return due

    def interrupted(self) -> Interrupted:
        """The exception for a stopped run whose state is saved."""
        return Interrupted(f"interrupted; the state is saved in {name(self.folder)}")

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Attributes errors inside to the saved state while `restored` is set.

        Raises:
            Refused: The run cannot resume from that state.
        """
        try:
            yield
        except (Refused, Failed, Interrupted):
            raise
        except Exception as error:
            if self.restored is None or out_of_memory(error):
                raise
            raise state_file.unusable(self.restored, error) from error

    @contextmanager
    def finishing(self) -> Iterator[Path]:
        """Yields a staging folder for the results; on exit its files are moved to the run's folder and the run is finished.

        The old record is removed before the first new result is moved, and the new one is moved last, so that a record
        always belongs to the results beside it.

        Raises:
            Failed: A file cannot be moved to its place.
        """
        stage = self.folder / STAGE
        try:
            stage.mkdir()
            yield stage
            new = sorted(stage.iterdir(), key=lambda path: path.name == RECORD)
            for old in (RECORD, *self._results):
                if old == RECORD or not (stage / old).exists():
                    (self.folder / old).unlink(missing_ok=True)
            for path in new:
                files.sync_folder(self.folder)  # keeps the order even if the power fails
                path.replace(self.folder / path.name)
            files.sync_folder(self.folder)
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        except OSError as error:
            raise Failed(f"cannot write {name(self.folder)}: {(error.strerror or 'failed').lower()}") from error
        finally:
            _clear(stage)
            with suppress(OSError):  # it may hold a saved state, or another file
                stage.parent.rmdir()


@contextmanager
def opened(
    folder: Path,
    settings: dict[str, Any],
    *,
    inputs: Iterable[Path] = (),
    results: Iterable[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    every: float = 30.0,
    command: str | None = None,
) -> Iterator[Run]:
    """Locks a folder for one run. If the run writes nothing, the folder is left as it was.

    Args:
        folder: The folder, created if missing.
        settings: Everything that the result depends on; a resumed run must have the same.
        inputs: Files and folders that the run reads. None of them is ever replaced or removed.
        results: Names of files that the run will write besides its record and report.
        resume: Resume the interrupted run in the folder; a finished one is recognised.
        overwrite: Start over; an earlier run's results are kept until the new ones are complete.
        every: Seconds between two saved states.
        command: The command line, stored in the state.

    Raises:
        Refused: The folder cannot be written, another process holds it, it holds another run, or a result would replace
            an input.
        Failed: The disk is full.
    """
    results = tuple(results)
    _keep_inputs(folder, inputs, (RECORD, REPORT, LOCK, *results))
    text = json.dumps(settings, sort_keys=True)
    with _made(folder), _locked(folder), _made(folder / CHECKPOINT.parent):
        record, checkpoint = folder / RECORD, folder / CHECKPOINT
        if checkpoint.parent.is_symlink():
            raise Refused(f"{name(checkpoint.parent)} is a symbolic link: remove it, or give another --out")
        if overwrite and not resume:
            with _writing(folder):
                checkpoint.unlink(missing_ok=True)
        saved = state_file.read(checkpoint) if os.path.lexists(checkpoint) else None
        there = files.sha256(record) if record.exists() else ""
        # A state that was to replace this record is newer than it; with any other record the run is finished.
        finished = bool(there) and (saved is None or saved.get("replaces") != there)
        if (there or saved) and not resume and not overwrite:
            state, mend = ("a finished run", "") if finished else ("an interrupted run", "--resume to resume it, ")
            raise Refused(f"{name(folder)} holds {state}: add {mend}--overwrite to start over, or choose another --out")
        if overwrite and not resume:
            finished = False
        if saved and not finished:
            refuse_other(f"{name(folder)} holds a run", json.loads(saved["settings"]), settings)
        _sweep(folder)
        run = Run(folder, text, saved, finished, every, there, results, command)
        with _gently(run):
            yield run


def _keep_inputs(folder: Path, inputs: Iterable[Path], results: Iterable[str]) -> None:
    """Refuses a folder in which a result or the saved state would replace an input."""
    places = [folder / result for result in results]
    for path in inputs:
        if _lies_in(path, folder / CHECKPOINT.parent) or any(same(path, place) for place in places):
            raise Refused(
                f"{name(path)} is read by this run and would be replaced in {name(folder)}: give another --out"
            )


def _lies_in(path: Path, folder: Path) -> bool:
    try:
        return any(
            same(parent, folder) for parent in (path.absolute(), *path.absolute().parents, path.resolve().parent)
        )
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a loop of links
        return False


def same(path: Path, other: Path) -> bool:
    """Whether two paths lead to the same existing file."""
    try:
        return path.samefile(other)
    except (OSError, ValueError):  # one of them does not exist
        return False


def refuse_other(holds: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `Refused`, with the settings that differ, unless the settings of two runs are the same."""
    old, new = json.loads(json.dumps(then)), json.loads(json.dumps(now))  # tuples are lists in a file
    if names := sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
        listed = ", ".join(f"{name}: {old.get(name)} then, {new.get(name)} now" for name in names[:3])
        raise Refused(f"{holds} with other settings ({listed}): choose another --out")


def _clear(stage: Path) -> None:
    """Removes staged results that were never moved."""
    with suppress(OSError):
        for path in stage.iterdir():
            path.unlink(missing_ok=True)
        stage.rmdir()


def _sweep(folder: Path) -> None:
    """Removes temporary files of killed processes; the lock ensures that no other process writes here."""
    _clear(folder / STAGE)
    for path in (*folder.glob(".*.tmp"), *(folder / CHECKPOINT.parent).glob(".*.tmp")):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Creates the folder and its parents; on exit, removes those that it created if they are empty."""
    made: list[Path] = []
    try:
        with _writing(folder):
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in made:
            with suppress(OSError, ValueError):  # it is not empty, or was never created
                path.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    with ExitStack() as held:
        with _writing(folder):
            ours = held.enter_context(files.held(path))
        if not ours:
            raise Refused(f"another process is working in {name(folder)}: wait for it, or give another --out")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = (getattr(error, "strerror", None) or "impossible name").lower()
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise Failed(f"cannot write into {name(folder)}: {reason}") from error
        raise Refused(f"cannot write into {name(folder)}: {reason}; give another --out") from error


@contextmanager
def _gently(run: Run) -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM stop the run after its round, a second one after the batch, a third one immediately.

    Raises:
        Interrupted: The run was stopped within a round, and can resume from an earlier one.
    """

    def ask(number: int, frame: FrameType | None) -> None:
        if run.at_once or run.stopping or run.asked > 1:  # several signals within a batch reach Python as one
            raise KeyboardInterrupt
        run.stopping = True

    if threading.current_thread() is not threading.main_thread():  # signals belong to the caller
        yield
        return
    before = {number: signal.signal(number, ask) for number in STOPS}
    try:
        with _answered(run):
            yield
    except KeyboardInterrupt:
        if (run.folder / CHECKPOINT).exists():
            raise run.interrupted() from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _answered(run: Run) -> Iterator[None]:
    """Runs a thread that answers signals at once, as the main thread only sees them after the current batch."""
    heard, hears = os.pipe()
    os.set_blocking(hears, False)
    thread = threading.Thread(target=_answer, args=(run, heard), daemon=True)
    before = signal.set_wakeup_fd(hears, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(hears)
        thread.join()
        os.close(heard)


def _answer(run: Run, heard: int) -> None:
    """Announces when each signal will stop the run, until the pipe is closed; a signal after the last warning ends the process."""
    warned = False
    while number := os.read(heard, 1):
        if number[0] not in STOPS:
            continue
        if warned:
            os._exit(128 + signal.SIGINT)  # files are written atomically
        run.asked += 1
        warned = run.at_once or run.asked > 1
        said = (
            "this batch; press Ctrl-C again to quit at once"
            if warned
            else "this round; press Ctrl-C again to stop after this batch"
        )
        with suppress(OSError):
            os.write(2, f"\nstopping after {said}\n".encode())
