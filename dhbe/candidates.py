"""Which state dict is meant, of all that a checkpoint holds: training scripts keep averages, teachers and critics too."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dhbe import foreign
from dhbe.errors import Refused

PLACES = ("state_dict", "model", "net", "model_state_dict")
"""Where training scripts put the state dict."""

AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|shadow)([._]|$)")
"""Names of averages over the steps of the training, which are what is deployed."""

OTHER = re.compile(r"^(optim|sched|lr_sched|scaler|callbacks|loops)")
"""Names of what belongs to the training and not to the network."""

DEEPEST = 4
"""Levels at which a state dict may lie."""

ALIKE = 0.8
"""Share of common shapes from which on two state dicts are taken for states of one network."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A state dict, or what looks like one."""

    where: str
    """Keys that lead to it, with dots between; empty for the outermost."""
    tensors: Mapping[str, Tensor]

    @property
    def averaged(self) -> bool:
        """Whether its name says that it is an average over training steps."""
        return AVERAGED.search(self.where.lower()) is not None

    @property
    def weighty(self) -> bool:
        """Whether it holds a matrix or a kernel."""
        return any(isinstance(value, Tensor) and value.ndim >= 2 for value in self.tensors.values())

    def alike(self, other: "Candidate") -> bool:
        """Whether both may be states of one network."""
        shapes = [Counter(tuple(value.shape) for value in each.tensors.values() if isinstance(value, Tensor))
                  for each in (self, other)]  # fmt: skip
        return shapes[0].keys() != set() and (shapes[0] & shapes[1]).total() >= ALIKE * max(s.total() for s in shapes)


@dataclass(frozen=True, eq=False)
class Choice:
    """The state dict that is meant."""

    chosen: Candidate
    twins: tuple[Candidate, ...] = ()
    """Other states of the same network."""
    note: str = ""


def candidates(outer: Mapping[Any, Any]) -> list[Candidate]:
    """All state dicts in what a file holds."""
    found = [Candidate(".".join(path), inner) for path, inner in _tables(outer, (), set())]
    weighty = [each for each in found if each.weighty]
    return weighty or [each for each in found if not each.where] or found


def choose(found: Sequence[Candidate], wanted: str | None = None) -> Choice:
    """The one that is meant.

    Args:
        found: At least one.
        wanted: Its name, or the last part of it; None takes the only one, or an average of the only other one.

    Raises:
        Refused: None has that name, or there are several and nothing tells which is meant.
    """
    if wanted is not None:
        named = [each for each in found if each.where == wanted] or [
            each for each in found if each.where.rpartition(".")[2] == wanted
        ]
        if len(named) != 1:
            raise Refused(
                f"holds no state dict {foreign.name(wanted)}, but {listed(found)}: give one of these to --weights"
            )
        return Choice(named[0], _twins(named[0], found))
    plain, averages = [each for each in found if not each.averaged], [each for each in found if each.averaged]
    main = [each for each in plain if _known(each.where)] or plain
    rivals = [each for each in plain if each not in main and any(each.alike(other) for other in main)]
    if len(main) + len(rivals) > 1 or (not main and len(averages) > 1):
        raise Refused(f"holds several state dicts: add --weights with one of {listed(found)}")
    if not main:
        return Choice(averages[0])
    averages = [each for each in averages if each.alike(main[0])]
    if not averages:
        return Choice(main[0])
    if len(averages) > 1:
        raise Refused(f"holds several averages of the weights: add --weights with one of {listed(found)}")
    best, other = averages[0], main[0]
    note = (
        f"the file holds the weights {other.where or 'at its top'} and their average {best.where}: the average is taken, "
        f"as it is what is deployed; --weights takes another ({listed([other, best])})"
    )
    return Choice(best, _twins(best, found), note)


def listed(found: Iterable[Candidate]) -> str:
    """Their names."""
    return ", ".join(foreign.name(each.where, longest=100) or "''" for each in found)


def _known(where: str) -> bool:
    return not where or any(part in PLACES for part in where.split("."))


def _twins(chosen: Candidate, found: Iterable[Candidate]) -> tuple[Candidate, ...]:
    return tuple(each for each in found if each is not chosen and each.alike(chosen))


def _tables(
    outer: Mapping[Any, Any], path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Dicts with tensors inside, with the keys that lead there; each once, whatever refers to it."""
    if id(outer) in seen or len(path) > DEEPEST:
        return
    seen.add(id(outer))
    if any(isinstance(value, Tensor) for value in outer.values()) and (
        not path or all(isinstance(key, str) for key in outer)
    ):
        yield path, outer
    for key, inner in outer.items():
        if isinstance(inner, dict) and isinstance(key, str) and not OTHER.match(key.lower()):
            yield from _tables(inner, (*path, key), seen)
