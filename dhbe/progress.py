"""Progress display of a run."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dhbe import foreign

if TYPE_CHECKING:
    from dhbe.defenses import RoundInfo
    from dhbe.steps import Round


class Progress:
    """Shows progress on stderr: a rich progress bar on a terminal, a plain line every ten seconds elsewhere.

    Args:
        total: Number of rounds or epochs.
        what: Description of the run.
        quiet: Whether to show nothing.
        folder: Folder of the run, for TensorBoard curves; None writes none.
    """

    def __init__(self, total: int, what: str, quiet: bool, folder: Path | None = None) -> None:
        self._total, self._what, self._quiet = total, foreign.line(what), quiet
        self._folder = folder
        self._live = not quiet and sys.stderr.isatty()
        self._began = self._last = self._seen = time.monotonic()
        self._first: int | None = None
        self._events: Any = None

    def __enter__(self) -> "Progress":
        if self._live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", markup=False), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"), TextColumn("{task.fields[signs]}"),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self._what, total=self._total, left="", signs="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._bar.stop()
        if self._events:
            self._events.close()

    def round_info(self, round_info: "RoundInfo") -> None:
        """Watches a round of a defence."""
        self.round(round_info.number, round_info.round)

    def round(self, number: int, round: "Round") -> None:
        """Watches a round of a search."""
        values = {name: float(value) for name, value in round.items()}
        self._step(number, values)
        self._record(number, values)

    def part(self, what: str, done: int, total: int) -> None:
        """Watches long work between rounds, whose time does not count for their pace."""
        now = time.monotonic()
        self._began, self._seen = self._began + now - self._seen, now
        said = f"{what}, {done} of {total}"
        if self._live:
            self._bar.update(self._task, left="", signs=said)
        elif not self._quiet and now - self._last >= 10:
            print(f"{self._what}: {said}", file=sys.stderr, flush=True)
            self._last = now

    def epoch(self, epoch: dict[str, float]) -> None:
        """Watches an epoch of a training."""
        self._step(int(epoch["epoch"]), {name: epoch[name] for name in ("loss", "acc")}, epoch.get("left"))

    def _step(self, number: int, values: dict[str, float], left: float | None = None) -> None:
        if self._quiet:
            return
        signs = "  ".join(f"{name} {value:.2f}" for name, value in in_words(values).items())
        now = self._seen = time.monotonic()
        if self._first is None:
            self._first, self._began = number, now
        if left is None and number > self._first:
            left = (now - self._began) / (number - self._first) * (self._total - number)
        remaining = "" if left is None or number == self._total else f", {spell(left)} left"
        if self._live:
            self._bar.update(self._task, completed=number, left=remaining.strip(", "), signs=signs)
        elif now - self._last >= 10 or number == self._total:
            print(f"{self._what}: {number} of at most {self._total}{remaining}  {signs}", file=sys.stderr, flush=True)
            self._last = now

    def _record(self, number: int, values: dict[str, float]) -> None:
        """Writes curves for TensorBoard, if it is installed."""
        if self._folder is None or self._events is False:
            return
        if self._events is None:
            try:
                from torch.utils.tensorboard.writer import SummaryWriter
            except ImportError:
                self._events = False
                return
            self._events = SummaryWriter(str(self._folder / "events"))
        for name, value in values.items():
            self._events.add_scalar(name, value, number)


WORDS = {
    "bn_loss": "BatchNorm loss", "gain": "trigger gain", "loss": "loss", "acc": "training accuracy",
    "distillation": "distillation loss", "restriction": "restriction loss",
}  # fmt: skip
"""Display names of a round's values."""


def in_words(values: Mapping[str, float]) -> dict[str, float]:
    """The values of a round by display name; of all families' margins, only the largest is kept.

    >>> in_words({"bn_loss": 0.2, "margin_masked": -7.1, "margin_faint": -2.0, "agreement": 0.9})
    {'BatchNorm loss': 0.2, 'largest margin': -2.0, 'agreement': 0.9}
    """
    margins = [value for name, value in values.items() if name.startswith("margin_")]
    said = {}
    for name, value in values.items():
        if not name.startswith("margin_"):
            said[WORDS.get(name, name.replace("_", " "))] = value
        elif "largest margin" not in said:
            said["largest margin"] = max(margins)
    return said


def spell(seconds: float) -> str:
    """A duration in seconds as rounded text.

    >>> spell(7.2), spell(125), spell(26219)
    ('7 s', '2 min', '7 h 17 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"
