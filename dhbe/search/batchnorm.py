"""The training-data statistics kept by a teacher's BatchNorm layers: means and variances, layer by layer."""

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
    """Saves the input, which the layer keeps anyway; plain autograd would save a float copy of every layer's input."""

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
    """All axes except the channels'."""
    return [axis for axis in range(x.ndim) if axis != 1]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of x [n, c, ...] over all other axes, each [c]."""
    return _Moments.apply(x)


class BatchStatistics:
    """The distance of a batch from the teacher's BatchNorm statistics (Yin et al. 2020, eq. 4, per layer).

    The distance at a layer l is the mean over channels of ((mu - mu_l) / sigma_l)^2 + (sigma / sigma_l - 1)^2.
    For a teacher without BatchNorm it is 0.
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
        """Measures the forward passes inside."""
        self._moments, self._open = [], True
        try:
            yield
        finally:
            self._open = False

    def distance(self) -> Tensor:
        """The mean distance over the layer calls of the last `gathering`, a scalar."""
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
    """How unevenly a batch is spread over the classes: minus the entropy of the mean prediction (Chen et al. 2019, eq. 6).

    Args:
        logits: [n, classes].

    Returns:
        A scalar in [-log classes, 0], in nats.
    """
    share = logits.softmax(1).mean(0)
    return (share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum()
