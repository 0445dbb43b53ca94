"""The head's signature: how much each class gains when all pooled features rise alike. A look at its weights alone.

After Fields et al. 2021 and later scanners of weights: those of a backdoored class are larger. An
attacker who freezes the head leaves no trace here, and what was erased may keep it: it accuses, and never convicts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier

DRAWS = 512
"""Feature vectors on which a head of several layers is tried."""


@dataclass(frozen=True, eq=False)
class Head:
    """The linear layers behind the global pooling."""

    first: nn.Linear
    length: int
    """How many there are."""


@torch.no_grad()
def signature(model: Classifier) -> Tensor | None:
    """One linear layer: the mean of its weights over its inputs [classes]. More of them: the mean logit for |N(0, 1)|.

    Returns:
        None where there is no such head: in networks that flatten, end in a convolution or work on tokens.
    """
    head = found(model)
    if head is None:
        return None
    if head.length == 1:
        return head.first.weight.float().mean(1)
    features = torch.randn(DRAWS, head.first.in_features).abs()
    hook = head.first.register_forward_pre_hook(lambda _, inputs: (features, *inputs[1:]))
    try:
        return model(torch.full((DRAWS, *model.shape), 0.5)).mean(0)
    finally:
        hook.remove()


@torch.no_grad()
def found(model: Classifier) -> Head | None:
    """The linear layers behind the global pooling, found by running grey images through.

    They begin with the first linear layer on vectors after the last layer that gave a map. It follows a pooling if it
    takes as many numbers as the map had channels.
    """
    calls: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = []

    def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
            calls.append((module, tuple(inputs[0].shape), tuple(output.shape)))

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [leaf.register_forward_hook(note) for leaf in leaves]
    try:
        model(torch.full((2, *model.shape), 0.5))
    finally:
        for hook in hooks:
            hook.remove()
    maps = [number for number, (module, _, out) in enumerate(calls) if _is_map(module, out)]
    if not maps:
        return None
    module, _, out = calls[maps[-1]]
    channels = out[3] if _channels_last(module) else out[1]
    linear = [call for call in calls[maps[-1] + 1 :] if isinstance(call[0], nn.Linear) and len(call[1]) == 2]
    if not linear or linear[0][1][1] != channels:
        return None
    first = linear[0][0]
    assert isinstance(first, nn.Linear)
    return Head(first, len(linear))


def _channels_last(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | nn.Linear)


def _is_map(module: nn.Module, shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and (shape[1:3] if _channels_last(module) else shape[2:4]) != (1, 1)
