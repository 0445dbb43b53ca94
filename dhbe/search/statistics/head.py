"""The head signature: how much each class gains when all pooled features rise equally. It depends on weights alone.

After Fields et al. 2021 and later weight scanners: the weights of a backdoored class are larger. An attacker who freezes the
head leaves no trace here, and an erased model may keep one: the signature is a reason for suspicion, not proof.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier

DRAWS = 512
"""Random feature vectors on which a head of several layers is evaluated."""


@dataclass(frozen=True, eq=False)
class Head:
    """The linear layers after the global pooling."""

    first: nn.Linear
    length: int
    """Number of these layers."""


@torch.no_grad()
def signature(model: Classifier) -> Tensor | None:
    """The signature of each class [classes]: of one linear layer, its weights' mean over the inputs; else a mean logit.

    With several linear layers, it is the mean logit for features drawn from |N(0, 1)|.

    Returns:
        None if there is no such head: in networks that flatten, end in a convolution or work on tokens.
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
    """Finds the linear layers after the global pooling, by a forward pass of grey images; None if there are none.

    They begin with the first linear layer on vectors after the last layer whose output is a feature map. A pooling lies
    between the two if that linear layer has as many inputs as the map has channels.
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
