"""Finds which layer feeds which by hooks in one forward pass, for any architecture and without relying on names.

A symbolic trace fails on data-dependent control flow, which is common in third-party networks. Following tensors from one
module to the next does not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier, evaluating
from dhbe.errors import Refused


@dataclass(frozen=True)
class Tap:
    """An output inside a network: the module, and which of its calls, as a module may be called more than once."""

    name: str
    call: int


@dataclass(eq=False)
class Graph:
    """The layers seen in one forward pass."""

    convolutions: list[nn.Conv2d] = field(default_factory=list)
    """The convolutions in execution order, each once."""
    normalised: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = field(default_factory=list)
    """Pairs of a convolution and the BatchNorm layer that it feeds directly."""
    stages: list[Tap] = field(default_factory=list)
    """The last features at each output resolution of a convolution, in order of first appearance."""
    reader: nn.Linear | None = None
    """The linear layer that reads the last features, flattened or averaged."""
    channels: int = 0
    """Channels of those last features."""


@torch.no_grad()
def trace(model: Classifier) -> Graph:
    """Passes two grey images through a model in eval mode and records its layers. The model is not changed.

    Raises:
        Refused: The network has no 2-d convolution that is a module.
    """
    graph, seen = Graph(), dict[int, nn.Conv2d]()
    kept: list[Tensor] = []  # keeps ids unique: a freed tensor's id may be reused
    calls: dict[str, int] = {}
    sizes: dict[tuple[int, int], list[tuple[Tap, bool]]] = {}  # taps of features, and whether they are composite
    worked: set[tuple[int, int]] = set()

    def note(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        kept.append(y)
        calls[name] = calls.get(name, 0) + 1
        if isinstance(module, nn.Conv2d):
            seen[id(y)] = module
            if module not in graph.convolutions:
                graph.convolutions.append(module)
            graph.reader = None  # it read earlier features
            worked.add((y.shape[2], y.shape[3]))
        if isinstance(module, nn.BatchNorm2d) and id(x) in seen:
            graph.normalised.append((seen[id(x)], module))
        if isinstance(module, nn.Linear) and graph.convolutions and graph.reader is None:
            graph.reader = module
        if y.ndim == 4:
            graph.channels = y.shape[1]
            composite = next(module.children(), None) is not None
            sizes.setdefault((y.shape[2], y.shape[3]), []).append((Tap(name, calls[name] - 1), composite))

    with _watched(model.network, note), evaluating(model):
        model(torch.full((2, *model.shape), 0.5, device=model.mean.device))
    if not graph.convolutions:
        raise Refused("the network has no convolution among its modules, and this defence needs one: choose another")
    for size, taps in sizes.items():
        if size in worked:
            blocks = [tap for tap, composite in taps if composite]
            graph.stages.append((blocks or [tap for tap, _ in taps])[-1])
    return graph


class Features:
    """Collects the outputs at some taps of a network in each forward pass inside the context."""

    def __init__(self, network: nn.Module, taps: list[Tap]) -> None:
        self._network, self._taps = network, taps
        self._outputs: dict[str, list[Tensor]] = {}

    def __enter__(self) -> "Features":
        names = {tap.name for tap in self._taps}
        self._hooks = [self._network.get_submodule(name).register_forward_hook(self._see(name)) for name in names]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            self._outputs.setdefault(name, []).append(output)

        return hook

    def take(self) -> list[Tensor]:
        """The outputs [n, c, h, w] at the taps, in their order; exactly one pass must have been made since the last call."""
        taken = [self._outputs[tap.name][tap.call] for tap in self._taps]
        self._outputs.clear()
        return taken


@contextmanager
def _watched(network: nn.Module, note: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls `note` with name, module, first input and output after each module that maps a tensor to a tensor."""

    def watch(name: str) -> Callable[[nn.Module, tuple, object], None]:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                note(name, module, inputs[0], output)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
