"""A run's folder: one process at a time, saved at intervals, continued after any interruption."""

import errno
import fcntl
import io
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from dhbe import files
from dhbe.errors import Failed, Interrupted, Refused

RECORD = "record.json"
REPORT = "report.html"
CHECKPOINT = Path("checkpoint") / "state.pt"
LOCK = ".lock"
TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
"""Names that `files.write` uses; a process that is killed leaves one."""


class Run:
    """A folder that this process holds, and how far the run in it came.

    Attributes:
        folder: Where the results go.
        finished: The folder holds the results of a finished run; there is nothing to do.
        saved: What the interrupted run saved last; None for a fresh one.
        stopping: Somebody asked the run to stop.
    """

    def __init__(self, folder: Path, settings: str, saved: dict[str, Any] | None, finished: bool, every: float) -> None:
        self.folder = folder
        self.saved = saved
        self.finished = finished
        self.stopping = False
        self._settings = settings
        self._every = every
        self._last = time.monotonic()

    def keep(self, state: Callable[[], dict[str, Any]], *, last: bool = False) -> None:
        """Saves the state if the interval is over, if it is the last one, or if somebody asked the run to stop.

        Raises:
            Interrupted: Somebody asked; the state is saved.
            Failed: It could not be saved.
        """
        if last or self.stopping or time.monotonic() - self._last >= self._every:
            buffer = io.BytesIO()
            torch.save({"settings": self._settings, **state()}, buffer)
            files.write(self.folder / CHECKPOINT, buffer.getvalue())
            self._last = time.monotonic()
        if self.stopping:
            raise Interrupted(f"interrupted; the state is saved, --resume --out {self.folder} goes on")

    def close(self) -> None:
        """Removes what only an interrupted run needs; the record is there by now."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's files are there
            (self.folder / CHECKPOINT.parent).rmdir()


@contextmanager
def opened(
    folder: Path,
    settings: dict[str, Any],
    *,
    results: Iterable[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    every: float = 30.0,
) -> Iterator[Run]:
    """Takes a folder for one run. If the run leaves nothing there, the folder is as it was before.

    Args:
        folder: It is made if it is not there.
        settings: All that the result depends on; a resumed run must have the same.
        results: Files that the run will write beside its record and report.
        resume: Go on with the interrupted run in the folder; a finished one is recognised.
        overwrite: Begin anew over an earlier run's results.
        every: Seconds between two checkpoints.

    Raises:
        Refused: The folder cannot be written, another process holds it, or it holds a run that was not asked for.
        Failed: The disk is full.
    """
    text = json.dumps(settings, sort_keys=True)
    with _made(folder), _locked(folder), _made(folder / CHECKPOINT.parent):
        record, checkpoint = folder / RECORD, folder / CHECKPOINT
        if overwrite and not resume:
            with _writing(folder):
                # The checkpoint first: a folder with neither is fresh, one with a record alone still reads as finished.
                for old in (CHECKPOINT, RECORD, REPORT, *results):
                    (folder / old).unlink(missing_ok=True)
        saved = _saved(checkpoint) if checkpoint.exists() else None
        finished = record.exists()
        if (finished or saved) and not resume:
            state, mend = ("a finished run", "") if finished else ("an interrupted run", "--resume to go on, ")
            raise Refused(f"{folder} holds {state}: add {mend}--overwrite to begin anew, or choose another --out")
        if saved and not finished:
            refuse_other(f"{folder} holds a run", json.loads(saved["settings"]), settings)
        _sweep(folder)
        run = Run(folder, text, saved, finished, every)
        with _gently(run):
            yield run


def refuse_other(holds: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `Refused`, with the names of what differs, unless the settings of two runs are the same."""
    old, new = json.loads(json.dumps(then)), json.loads(json.dumps(now))  # tuples are lists in a file
    if names := sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
        listed = ", ".join(f"{name}: {old.get(name)} then, {new.get(name)} now" for name in names[:3])
        raise Refused(f"{holds} of other settings ({listed}): choose another --out")


def _sweep(folder: Path) -> None:
    """Removes the temporaries of killed processes; nobody else writes here now."""
    for path in (*folder.glob(".*.tmp"), *(folder / CHECKPOINT.parent).glob(".*.tmp")):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder is there inside. Afterwards those that were made for it and are empty go again."""
    made: list[Path] = []
    try:
        with _writing(folder):
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in made:
            with suppress(OSError, ValueError):  # it holds something, or was never there
                path.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    with _writing(folder):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it whatever happens to us
            ours = path.stat().st_ino == os.fstat(descriptor).st_ino  # not one that its holder has just removed
        except OSError as error:
            raise _taken(folder) from error
        if not ours:
            raise _taken(folder)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _taken(folder: Path) -> Refused:
    return Refused(f"another process works in {folder}: wait for it, or give another --out")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = (getattr(error, "strerror", None) or "impossible name").lower()
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise Failed(f"cannot write into {folder}: {reason}") from error
        raise Refused(f"cannot write into {folder}: {reason}; give another --out") from error


@contextmanager
def _gently(run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the run to save and stop; a second one does not wait."""

    def ask(number: int, frame: FrameType | None) -> None:
        if run.stopping:
            raise KeyboardInterrupt
        run.stopping = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's business
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _saved(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        json.loads(saved["settings"])
    except Exception as error:  # whatever is wrong with it, it cannot be gone on with
        raise Refused(f"{path} cannot be read: add --overwrite to begin anew") from error
    return saved
