"""Which layer feeds which, seen by watching one pass through a network: any architecture, no names, no own code.

A symbolic trace fails on data-dependent control flow, and most networks of strangers have some. Watching which tensor
leaves one layer and enters another needs nothing but modules.
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
    """An output inside a network: which call of which module gave it. A module may be called more than once."""

    name: str
    call: int


@dataclass(eq=False)
class Graph:
    """What one pass showed."""

    convolutions: list[nn.Conv2d] = field(default_factory=list)
    """In the order in which they ran, each once."""
    normalised: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = field(default_factory=list)
    """Each BatchNorm layer that a convolution feeds directly, behind that convolution."""
    stages: list[Tap] = field(default_factory=list)
    """The last features of each resolution at which a convolution works, in the order of resolutions."""
    reader: nn.Linear | None = None
    """The linear layer that reads the last features, flattened or averaged."""
    channels: int = 0
    """Channels of those last features."""


@torch.no_grad()
def trace(model: Classifier) -> Graph:
    """Passes two grey images through a model in eval mode and notes what runs. The model stays as it is.

    Raises:
        Refused: The network has no 2-d convolution that is a module.
    """
    graph, seen = Graph(), dict[int, nn.Conv2d]()
    kept: list[Tensor] = []  # a tensor that is freed gives its identity to the next one
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
            graph.reader = None  # what read earlier features does not count
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
        raise Refused("the network has no convolution among its modules: this defence works on its filters")
    for size, taps in sizes.items():
        if size in worked:
            blocks = [tap for tap, composite in taps if composite]
            graph.stages.append((blocks or [tap for tap, _ in taps])[-1])
    return graph


class Features:
    """The outputs at some taps of a network, in each forward pass inside the context."""

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
        """What the taps gave since the last call; one pass must have been made."""
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
