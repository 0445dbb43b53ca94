"""What stands around the weights in a file of `torch.save`, kept so that the script that wrote it can read a new one."""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dhbe.candidates import OTHER, Candidate, Choice
from dhbe.matching import Match, match

LEFT_OUT = object()
"""Stands for what is not plain."""

DEEPEST = 8
"""Levels of dicts and lists that are kept."""


class Container(ABC):
    """The form in which a model came: how it is matched to a network, and how new weights are written in it."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The files that it writes, beside the file of ours."""

    @abstractmethod
    def content(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        """These files, with the cleaned network's tensors under the names of the file that came."""

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Image shape, if the form tells it."""
        return None

    def match(self, network: nn.Module, tensors: Mapping[str, Tensor], weights: str | None) -> Match:
        """Finds the network's names of the tensors, as `matching.match` does."""
        return match(network, tensors, weights)

    def check(self, network: nn.Module, shape: tuple[int, int, int]) -> None:  # noqa: B027 (most forms check nothing)
        """Raises `Refused` if the network does not compute what the file does; few forms can tell."""


@dataclass(frozen=True)
class Place:
    """Where a state dict stood."""

    number: int
    """0 for the one that was read; its averages follow."""


@dataclass(frozen=True, eq=False)
class TorchFile(Container):
    """A file of `torch.save`: all of it that is plain, without what belongs to the training."""

    name: str
    mould: Any
    """Dicts, lists, numbers and texts, with a `Place` for each state dict."""
    twins: tuple[Mapping[str, Tensor], ...]
    """The averages of the weights, or the weights beside an average: they get the cleaned weights too."""
    rename: Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]
    """Gives a twin the network's values."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def content(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        states = [dict(tensors), *(self.rename(network, twin) for twin in self.twins)]
        stream = io.BytesIO()
        torch.save(_filled(self.mould, states), stream)
        return {self.name: stream.getvalue()}


def mould(outer: Mapping[Any, Any], choice: Choice) -> tuple[Any, tuple[Candidate, ...]]:
    """What `TorchFile` keeps of a file: its mould, and the twins whose places are in it."""
    chosen = choice.chosen
    twins = tuple(twin for twin in choice.twins if twin.averaged != chosen.averaged)
    places = {id(each.tensors): Place(number) for number, each in enumerate((chosen, *twins))}
    others = {id(each.tensors) for each in choice.twins} - places.keys()
    return _kept(outer, places, others, 0), twins


def tensors(outer: Any, depth: int = 0) -> Iterator[Tensor]:
    """All tensors in dicts and lists, each as often as it is held there: so often will it be copied."""
    if isinstance(outer, Tensor):
        yield outer
    elif isinstance(outer, dict | list | tuple) and depth < DEEPEST:
        for each in outer.values() if isinstance(outer, dict) else outer:
            yield from tensors(each, depth + 1)


def _kept(value: Any, places: Mapping[int, Place], others: set[int], depth: int) -> Any:
    """The plain part of a value; `others` are states of the network that would bring the backdoor back."""
    if id(value) in places:
        return places[id(value)]
    if isinstance(value, dict) and depth < DEEPEST:
        inside = {
            key: _kept(each, places, others, depth + 1)
            for key, each in value.items()
            if isinstance(key, str | int) and not OTHER.match(str(key).lower()) and id(each) not in others
        }
        return {key: each for key, each in inside.items() if each is not LEFT_OUT}
    if isinstance(value, list | tuple) and depth < DEEPEST:
        inside = [_kept(each, places, others, depth + 1) for each in value]
        return LEFT_OUT if any(each is LEFT_OUT for each in inside) else type(value)(inside)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.detach().clone() if type(value) is Tensor and value.layout == torch.strided else LEFT_OUT


def _filled(value: Any, states: list[dict[str, Tensor]]) -> Any:
    if isinstance(value, Place):
        return states[value.number]
    if isinstance(value, dict):
        return {key: _filled(each, states) for key, each in value.items()}
    return value
