"""A run's folder: one process at a time, saved at intervals, continued after any interruption."""

import fcntl
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from dhbe import files
from dhbe.errors import Interrupted, Refused

RECORD = "record.json"
REPORT = "report.html"
CHECKPOINT = Path("checkpoint") / "state.pt"
LOCK = ".lock"


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


@contextmanager
def opened(
    folder: Path, settings: dict[str, Any], *, resume: bool = False, overwrite: bool = False, every: float = 30.0
) -> Iterator[Run]:
    """Takes a folder for one run.

    Args:
        folder: It is made if it is not there.
        settings: All that the result depends on; a resumed run must have the same.
        resume: Go on with the interrupted run in the folder; a finished one is recognised.
        overwrite: Begin anew over an earlier run's results.
        every: Seconds between two checkpoints.

    Raises:
        Refused: The folder cannot be written, another process holds it, or it holds a run that was not asked for.
    """
    text = json.dumps(settings, sort_keys=True)
    fresh = not folder.exists()
    with _locked(folder):
        record, checkpoint = folder / RECORD, folder / CHECKPOINT
        if overwrite and not resume:
            # The checkpoint first: a folder with neither is fresh, one with a record alone still reads as finished.
            for old in (checkpoint, record, folder / REPORT):
                old.unlink(missing_ok=True)
        saved = _saved(checkpoint) if checkpoint.exists() else None
        finished = record.exists()
        if (finished or saved) and not resume:
            state, mend = ("a finished run", "") if finished else ("an interrupted run", "--resume to go on, ")
            raise Refused(f"{folder} holds {state}: add {mend}--overwrite to begin anew, or choose another --out")
        if saved and not finished and saved["settings"] != text:
            raise Refused(f"{folder} holds a run of other settings ({_differing(saved['settings'], settings)})")
        run = Run(folder, text, saved, finished, every)
        try:
            with _gently(run):
                yield run
        finally:
            if fresh and not (checkpoint.exists() or record.exists()):
                _discard(folder)


def _discard(folder: Path) -> None:
    """A run that failed before it saved anything leaves no new folder behind."""
    (folder / LOCK).unlink(missing_ok=True)
    for path in ((folder / CHECKPOINT).parent, folder):
        with suppress(OSError):  # it holds something else after all
            path.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        (folder / CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise Refused(
            f"cannot write into {folder}: {(error.strerror or 'failed').lower()}; give another --out"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it whatever happens to us
        except OSError as error:
            raise Refused(f"another process works in {folder}: wait for it, or give another --out") from error
        yield
    finally:
        os.close(descriptor)


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
    except Exception as error:  # whatever is wrong with it, it cannot be gone on with
        raise Refused(f"{path} cannot be read: add --overwrite to begin anew") from error
    if not isinstance(saved, dict) or "settings" not in saved:
        raise Refused(f"{path} is no checkpoint of dhbe: add --overwrite to begin anew")
    return saved


def _differing(saved: str, settings: dict[str, Any]) -> str:
    """The settings that differ, by name."""
    old, new = json.loads(saved), json.loads(json.dumps(settings))
    names = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return ", ".join(f"{name}: {old.get(name)} then, {new.get(name)} now" for name in names[:3])
