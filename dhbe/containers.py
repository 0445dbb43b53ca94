"""Keeps the content of a `torch.save` file around its weights, so that the original script can read the cleaned file."""

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
"""Marks values that are not plain."""

DEEPEST = 8
"""Maximum nesting level of dicts and lists that are kept."""


class Container(ABC):
    """A model's original file format: how it is matched to a network, and how new weights are written in it."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the files that it writes, in addition to clean.safetensors."""

    @abstractmethod
    def content(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        """The content of these files by name, with the cleaned network's tensors under the original names."""

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Image shape (channels, height, width), if the format contains it."""
        return None

    def match(self, network: nn.Module, tensors: Mapping[str, Tensor], weights: str | None) -> Match:
        """Matches the tensors to the network's names, like `matching.match`."""
        return match(network, tensors, weights)

    def check(self, network: nn.Module, shape: tuple[int, int, int]) -> None:  # noqa: B027 (most formats check nothing)
        """Raises `Refused` if the network does not compute the same as the file; only few formats can tell."""


@dataclass(frozen=True)
class Place:
    """A placeholder for a state dict."""

    number: int
    """0 for the chosen state dict; its twins follow."""
    beside: Mapping[str, Any]
    """Numbers and texts between its tensors."""


@dataclass(frozen=True, eq=False)
class TorchFile(Container):
    """A file of `torch.save`: its plain content, without training state."""

    name: str
    mould: Any
    """Dicts, lists, numbers and texts, with a `Place` for each state dict."""
    twins: tuple[Mapping[str, Tensor], ...]
    """Averages of the weights, or the weights of a chosen average, which get the cleaned weights too."""
    rename: Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]
    """Fills a twin with the network's values."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def content(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        states = [dict(tensors), *(self.rename(network, twin) for twin in self.twins)]
        stream = io.BytesIO()
        torch.save(_filled(self.mould, states), stream)
        return {self.name: stream.getvalue()}


def mould(outer: Mapping[Any, Any], choice: Choice) -> tuple[Any, tuple[Candidate, ...]]:
    """The parts of a file for `TorchFile`: its mould, and the twins whose places are in it."""
    chosen = choice.chosen
    twins = tuple(twin for twin in choice.twins if twin.averaged != chosen.averaged)
    places = {id(each.tensors): Place(number, plain(each.tensors)) for number, each in enumerate((chosen, *twins))}
    others = {*(id(each.tensors) for each in choice.twins), *map(id, choice.unnamed)} - places.keys()
    return _kept(outer, places, others, 0), twins


def plain(state: Mapping[Any, Any]) -> dict[str, Any]:
    """The numbers and texts that a script keeps between the tensors of a state dict, such as the epoch."""
    return {key: value for key, value in state.items() if value is None or isinstance(value, bool | int | float | str)}


def tensors(outer: Any, depth: int = 0) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists, each as often as it occurs, since each occurrence is copied."""
    if isinstance(outer, Tensor):
        yield outer
    elif isinstance(outer, dict | list | tuple) and depth < DEEPEST:
        for each in outer.values() if isinstance(outer, dict) else outer:
            yield from tensors(each, depth + 1)


def _kept(value: Any, places: Mapping[int, Place], others: set[int], depth: int) -> Any:
    """The plain part of a value, without `others`, states of the network that still hold the backdoor."""
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
        if id(value) in others:
            return LEFT_OUT
        inside = [_kept(each, places, others, depth + 1) for each in value]
        return LEFT_OUT if any(each is LEFT_OUT for each in inside) else type(value)(inside)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.detach().clone() if type(value) is Tensor and value.layout == torch.strided else LEFT_OUT


def _filled(value: Any, states: list[dict[str, Tensor]]) -> Any:
    if isinstance(value, Place):
        return {**states[value.number], **value.beside}
    if isinstance(value, dict):
        return {key: _filled(each, states) for key, each in value.items()}
    return value
