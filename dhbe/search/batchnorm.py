"""What the BatchNorm layers of a teacher remember of its training data: its means and variances, layer by layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Layer = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def tracked(model: nn.Module) -> list[Layer]:
    """The BatchNorm layers that keep running statistics, in order of registration."""
    return [layer for layer in model.modules() if isinstance(layer, Layer) and layer.running_mean is not None]


class _Moments(torch.autograd.Function):
    """Plain autograd would keep a float copy of every layer's input; this keeps the input, which the layer keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=_others(x), correction=0)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        column = (1, -1) + (1,) * (x.ndim - 2)
        of_mean, of_variance, mean = (each.view(column) for each in (*gradients, mean))
        count = x.numel() // x.shape[1]
        return ((of_mean - 2 * of_variance * mean + 2 * of_variance * x) / count).to(x.dtype)


def _others(x: Tensor) -> list[int]:
    """All axes but the channels'."""
    return [axis for axis in range(x.ndim) if axis != 1]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of [n, c, ...], over all else."""
    return _Moments.apply(x)


class BatchStatistics:
    """How far a batch lies from what the teacher's BatchNorm layers remember (Yin et al. 2020, eq. 4, per layer).

    The distance of a layer is the mean over channels of ((mu - mu_l) / sigma_l)^2 + (sigma / sigma_l - 1)^2.
    A teacher without BatchNorm has distance 0.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self._layers = tracked(teacher)
        self._moments: list[tuple[Tensor, Tensor, Layer]] = []
        self._open = False

    def __enter__(self) -> "BatchStatistics":
        self._hooks = [layer.register_forward_pre_hook(self._see) for layer in self._layers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, layer: Layer, inputs: tuple[Tensor, ...]) -> None:
        if self._open:
            mean, variance = moments(inputs[0])
            self._moments.append((mean, variance, layer))

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Forward passes inside are measured."""
        self._moments, self._open = [], True
        try:
            yield
        finally:
            self._open = False

    def distance(self) -> Tensor:
        """The mean distance over the layers that the last gathering passed."""
        total = torch.zeros(())
        for mean, variance, layer in self._moments:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            scale = (layer.running_var + layer.eps).sqrt()
            shift = ((mean - layer.running_mean) / scale).square()
            stretch = ((variance + layer.eps).sqrt() / scale - 1).square()
            total = total + (shift + stretch).mean()
        return total / max(1, len(self._moments))


def imbalance(logits: Tensor) -> Tensor:
    """How unevenly a batch falls on the classes: minus the entropy of the mean prediction (Chen et al. 2019, eq. 6)."""
    share = logits.softmax(1).mean(0)
    return (share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum()
