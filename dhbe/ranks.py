"""Data-parallel runs under `torchrun`: each process computes its share of every batch, and all stay in step.

Every process draws noise and positions for the whole batch from the same random state and takes its part; sums over the
batch, as in BatchNorm, and gradients are those of the whole batch. So N processes compute the same as one, up to the order
of summation. With a single process, all functions here do nothing.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dhbe.errors import Refused

PATIENCE = timedelta(hours=12)
"""Timeout of communication, long because the others wait while the first process measures."""


@contextmanager
def joined() -> Iterator[bool]:
    """Joins the processes started by `torchrun`; yields whether this is the first, which measures, writes and prints.

    GPUs are used if there are at least as many as processes on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield True
        return
    local, on_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpus:
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if on_gpus else "gloo", timeout=PATIENCE)
    try:
        yield rank() == 0
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def check(batch: int, name: str = "batch") -> None:
    """Checks that a batch can be divided evenly among the processes.

    Raises:
        Refused: It is not a multiple of their number.
    """
    if batch % size():
        raise Refused(f"--{name} {batch}: {size()} processes share it, so it must be a multiple of {size()}")


def part(batch: Tensor) -> Tensor:
    """This process's share of a batch [n, ...]: [n / processes, ...]."""
    return batch if size() == 1 else batch.chunk(size())[rank()]


def total(values: Tensor) -> Tensor:
    """The differentiable sum over processes."""
    return values if size() == 1 else _Total.apply(values)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def average(parameters: Iterable[nn.Parameter]) -> None:
    """Averages gradients over processes, in place."""
    if size() == 1:
        return
    gradients = [each.grad for each in parameters if each.grad is not None]
    if gradients:
        flat = torch.cat([each.flatten() for each in gradients])
        distributed.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / size()).split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def agreed(values: Tensor) -> Tensor:
    """The values of the first process, so that all take the same decisions even if their GPUs round differently."""
    if size() > 1:
        values = values.contiguous()
        distributed.broadcast(values, 0)
    return values


@contextmanager
def whole_batches(*networks: nn.Module) -> Iterator[None]:
    """Makes BatchNorm layers in training mode use the statistics of all processes' batches inside."""
    layers = [module for network in networks for module in network.modules() if isinstance(module, _BatchNorm)]
    if size() > 1:
        for layer in layers:
            layer.forward = partial(_normalised, layer)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        summed = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        return summed


def _normalised(layer: _BatchNorm, pixels: Tensor) -> Tensor:
    """BatchNorm over all processes, in two passes and at least fp32; torch's SyncBatchNorm would need GPUs."""
    if not layer.training:
        return type(layer).forward(layer, pixels)
    x = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    shape = (1, -1, *[1] * (pixels.ndim - 2))
    axes, count = [0, *range(2, x.ndim)], size() * x.numel() // x.shape[1]
    mean = total(x.sum(axes)) / count
    centred = x - mean.view(shape)
    variance = total(centred.square().sum(axes)) / count
    if layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None:
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.add_(1)
        share = layer.momentum if layer.momentum is not None else 1 / float(layer.num_batches_tracked)
        layer.running_mean.lerp_(mean.detach(), share)
        layer.running_var.lerp_(variance.detach() * (count / max(1, count - 1)), share)
    scaled = centred * (variance + layer.eps).rsqrt().view(shape)
    if layer.affine:
        scaled = scaled * layer.weight.view(shape) + layer.bias.view(shape)
    return scaled.to(pixels.dtype)
