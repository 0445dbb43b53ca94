"""Faster inference: folds BatchNorm into the layer before it, and uses channels-last weights.

In eval mode, BatchNorm is one multiplication and one addition per channel, which can be folded into the weights of a
preceding convolution or linear layer. The layers are found by tracing the network's code. Networks that cannot be traced,
because of data-dependent control flow, or whose outputs would differ are not folded.
"""

import copy
import warnings
from collections import Counter

import torch
from torch import Tensor, fx, nn

from dhbe.classifier import Classifier
from dhbe.steps import channels_last, frozen_copy

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

TOLERANCE = 1e-4
"""Largest difference of logits that counts as rounding, relative to the largest logit."""


def quick(model: Classifier) -> Classifier:
    """A faster frozen copy with the same logits up to rounding. Folded BatchNorm layers, and their hooks, are gone."""
    plain = frozen_copy(model)
    channels_last(plain)
    pairs = foldable(plain.network)
    if not pairs:
        return plain
    folded = copy.deepcopy(plain)
    for layer, norm in pairs:
        fold(folded.network, layer, norm)
    return folded if _agree(plain, folded) else plain


def foldable(network: nn.Module) -> list[tuple[str, str]]:
    """Pairs of names of a layer and the BatchNorm that alone reads its output; both run exactly once."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = copy.deepcopy(network)  # tracing runs its code, which may have side effects
            nodes = list(fx.Tracer().trace(trial).nodes)
    except Exception:  # code that cannot be traced may raise anything
        return []
    modules = dict(network.named_modules())
    runs = Counter(node.target for node in nodes if node.op == "call_module")
    apart = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    """Modules whose tensors the code reads without calling them."""

    def alone(node: fx.Node, kinds: tuple[type[nn.Module], ...]) -> bool:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        return (
            module is not None and type(module) in kinds and runs[node.target] == 1 and str(node.target) not in apart
            and not (module._forward_hooks or module._forward_pre_hooks)
        )  # fmt: skip

    pairs = []
    for node in nodes:
        before = node.args[0] if len(node.args) == 1 else None
        if not (isinstance(before, fx.Node) and alone(node, NORMS) and alone(before, LAYERS)):
            continue
        if len(before.users) == 1 and modules[str(node.target)].running_mean is not None:
            pairs.append((str(before.target), str(node.target)))
    return pairs


@torch.no_grad()
def fold(network: nn.Module, layer_name: str, norm_name: str) -> None:
    """Folds a BatchNorm in eval mode into the weights of the layer before it, and replaces it with an identity."""
    layer, norm = network.get_submodule(layer_name), network.get_submodule(norm_name)
    assert isinstance(layer, LAYERS)
    assert isinstance(norm, NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, scale = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(mean)
    if norm.weight is not None:
        scale, shift = scale * norm.weight.double(), norm.bias.double()
    weight: Tensor = layer.weight
    bias = (layer.bias.double() if layer.bias is not None else 0.0) - mean
    column = scale.view(-1, *[1] * (weight.ndim - 1))
    layer.weight = nn.Parameter((weight.double() * column).to(weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter((bias * scale + shift).to(weight.dtype), requires_grad=False)
    for parent in network.modules():
        for name, child in list(parent._modules.items()):  # `named_children` lists a shared module only once
            if child is norm:
                setattr(parent, name, nn.Identity())


@torch.no_grad()
def _agree(one: Classifier, other: Classifier) -> bool:
    """Whether two classifiers have the same logits on noise, up to rounding."""
    device = one.mean.device
    noise = torch.rand(8, *one.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    with torch.autocast(device.type, enabled=False):
        try:
            expected, found = one(noise), other(noise)
        except Exception:  # code that accesses its BatchNorm layers
            return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())
