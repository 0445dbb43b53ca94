"""Experiments: a list of cases for each scale, and what is drawn from their records."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dhbe.bench.cases import Case
from dhbe.bench.drawing import Drawn, Result
from dhbe.bench.scales import Scale

Results = Sequence[Result]


class Drawing(Protocol):
    """What draws results, as `Grid` and `Curves` do."""

    def __call__(self, results: Results) -> Drawn: ...


@dataclass(frozen=True)
class Experiment:
    """One table or figure, or some of each."""

    title: str
    cases: Callable[[Scale], Iterable[Case]]
    """The cases of a scale, with their labels."""
    draw: Sequence[Drawing]
    note: str = ""
    """What a reader should know of it."""
    name: str = ""
    """On the command line; that of its file."""
    file: Path | None = None
    """The user's file that it was read from."""
