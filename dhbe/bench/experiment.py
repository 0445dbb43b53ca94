"""Experiments: a list of cases for each scale, and drawings of their records."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dhbe.bench.cases import Case
from dhbe.bench.drawing import Drawn, Result
from dhbe.bench.scales import Scale

Results = Sequence[Result]


class Drawing(Protocol):
    """A function that draws results, such as `Grid` and `Curves`."""

    def __call__(self, results: Results) -> Drawn: ...


@dataclass(frozen=True)
class Experiment:
    """One or more tables and figures."""

    title: str
    cases: Callable[[Scale], Iterable[Case]]
    """The cases of a scale, with their labels."""
    draw: Sequence[Drawing]
    note: str = ""
    """A note for readers."""
    name: str = ""
    """Name on the command line, from its file."""
    file: Path | None = None
    """The user's file that it was read from."""
