"""Chooses a state dict among all in a checkpoint, as training scripts also save averages, teachers and critics."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dhbe import foreign
from dhbe.errors import Refused

PLACES = ("state_dict", "model", "net", "model_state_dict")
"""Keys under which training scripts store the state dict."""

AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|shadow)([._]|$)")
"""Names of averages over training steps, which are what is deployed."""

OTHER = re.compile(r"^(optim|sched|lr_sched|scaler|callbacks|loops)")
"""Names of training state that is not part of the network."""

DEEPEST = 4
"""Maximum nesting level of a state dict."""

ALIKE = 0.8
"""Share of common shapes from which two state dicts count as states of the same network."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A possible state dict."""

    where: str
    """The dotted path of keys that leads to it; empty for the outermost."""
    tensors: Mapping[str, Tensor]
    averaged: bool
    """Whether it is an average over training steps, by its name."""

    @property
    def weighty(self) -> bool:
        """Whether it holds a matrix or a kernel."""
        return any(isinstance(value, Tensor) and value.ndim >= 2 for value in self.tensors.values())

    def alike(self, other: "Candidate") -> bool:
        """Whether both may be states of the same network."""
        shapes = [Counter(tuple(value.shape) for value in each.tensors.values() if isinstance(value, Tensor))
                  for each in (self, other)]  # fmt: skip
        return shapes[0].keys() != set() and (shapes[0] & shapes[1]).total() >= ALIKE * max(s.total() for s in shapes)


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen state dict."""

    chosen: Candidate
    twins: tuple[Candidate, ...] = ()
    """Other states of the same network."""
    note: str = ""
    unnamed: tuple[list[Tensor], ...] = ()
    """Further states of the network, as lists without names."""


def candidates(outer: Mapping[Any, Any]) -> list[Candidate]:
    """All state dicts in the content of a file."""
    found = [_candidate(".".join(path), inner, outer) for path, inner in _tables(outer, (), set())]
    weighty = [each for each in found if each.weighty]
    return weighty or [each for each in found if not each.where] or found


def choose(found: Sequence[Candidate], wanted: str | None = None) -> Choice:
    """Chooses one state dict.

    Args:
        found: At least one candidate.
        wanted: Its path, or the last part of it; None chooses the only one, or the average of the only other one.

    Raises:
        Refused: None has that name, or the choice is ambiguous.
    """
    if wanted is not None:
        named = [each for each in found if each.where == wanted] or [
            each for each in found if each.where.rpartition(".")[2] == wanted
        ]
        if len(named) != 1:
            raise Refused(
                f"holds no state dict {foreign.name(wanted)}, but {listed(found)}: give --weights one of these"
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
        f"the file holds weights ({other.where or 'at its top level'}) and their average ({best.where}): using the average, "
        f"which is what is deployed; --weights selects another ({listed([other, best])})"
    )
    return Choice(best, _twins(best, found), note)


def unnamed(outer: Mapping[Any, Any], chosen: Candidate) -> dict[str, list[Tensor]]:
    """Lists of tensors that may be states of the same network, such as averages without names, by their paths."""
    shapes = Counter(tuple(value.shape) for value in chosen.tensors.values() if isinstance(value, Tensor))
    return {
        ".".join(path): inner
        for path, inner in _lists(outer, ())
        if any(value.ndim >= 2 for value in inner)
        and (shapes & Counter(tuple(value.shape) for value in inner)).total() >= ALIKE * len(inner)
    }


def listed(found: Iterable[Candidate]) -> str:
    """The paths of candidates as text."""
    return ", ".join(foreign.name(each.where, longest=100) or "''" for each in found)


def _candidate(where: str, inner: Mapping[str, Tensor], outer: Mapping[Any, Any]) -> Candidate:
    averaged, about = AVERAGED.search(where.lower()) is not None, outer.get("meta")
    if isinstance(about, dict) and "mmengine_version" in about and where in ("state_dict", "ema_state_dict"):
        averaged = (
            where == "state_dict"
        )  # mmengine exchanges the two when it saves, so that its readers get the average
    return Candidate(where, inner, averaged)


def _known(where: str) -> bool:
    return not where or any(part in PLACES for part in where.split("."))


def _twins(chosen: Candidate, found: Iterable[Candidate]) -> tuple[Candidate, ...]:
    return tuple(each for each in found if each is not chosen and each.alike(chosen))


def _tables(
    outer: Mapping[Any, Any], path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Dicts that contain tensors, with the keys that lead to them; each once, however often it is referenced."""
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


def _lists(outer: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Tensor]]]:
    """Lists of tensors, with the keys that lead to them."""
    for key, inner in outer.items():
        if not isinstance(key, str) or OTHER.match(key.lower()) or len(path) > DEEPEST:
            continue
        if isinstance(inner, dict):
            yield from _lists(inner, (*path, key))
        elif isinstance(inner, list) and inner and all(isinstance(value, Tensor) for value in inner):
            yield (*path, key), inner
