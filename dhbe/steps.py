"""What everything that trains shares: scopes of device, seed and precision, losses, one step of an optimiser."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from dhbe import ranks
from dhbe.classifier import Classifier

Precision = Literal["fp32", "bf16"]
"""What networks compute in."""

Round = dict[str, Tensor]
"""What one round came to: scalars by name. They stay on the device until somebody looks."""


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Tensors are made there; of several GPUs it is the current one, whose random state and streams are meant."""
    with torch.device(device), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def secluded() -> AbstractContextManager[None]:
    """Gives the caller's random states back afterwards; those of all GPUs, for `torch.manual_seed` is for all."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else [])


def computing(device: torch.device, precision: Precision) -> torch.autocast:
    """The networks inside compute in this precision.

    Autocast goes without its cache, which outlives a step and would go on answering with the weights of the first one.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def gap(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of logits [n, classes] over batch and classes (eq. 2 and eq. 7)."""
    return F.l1_loss(a, b)


def variation(images: Tensor) -> Tensor:
    """Sum over the four neighbour directions of the L2 norm of the whole batch's differences, not averaged.

    Args:
        images: Normalised images [n, c, h, w].
    """
    across, down = images[..., :, 1:] - images[..., :, :-1], images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    if ranks.size() > 1:  # the norms are those of the whole batch, whose parts lie apart
        squares = [each.square().sum() for each in (across, down, falling, rising)]
        return ranks.total(torch.stack(squares)).sqrt().sum()
    return across.norm() + down.norm() + falling.norm() + rising.norm()


def lay(patches: Tensor, height: int, width: int, *, each: bool) -> Tensor:
    """Patches [n, c, p, p] at random places of empty images [n, c, height, width]; zeros elsewhere.

    Each patch has its own place or, as in the paper, all of a batch share one. The rows and columns are set by two
    products with 0/1 matrices, so that shapes stay fixed and nothing waits for the device.
    """
    count, side = ranks.size() * patches.shape[0] if each else 1, patches.shape[-1]
    offsets = torch.arange(side, device=patches.device).view(1, side, 1)

    def rails(length: int) -> Tensor:
        first = torch.randint(length - side + 1, (count, 1, 1), device=patches.device)
        first = ranks.part(first) if each else first
        return (torch.arange(length, device=patches.device) == first + offsets).to(patches.dtype)

    rows, columns = rails(height), rails(width)
    return rows.transpose(1, 2).unsqueeze(1) @ patches @ columns.unsqueeze(1)


def descend(optimizer: Optimizer, loss: Tensor) -> None:
    """One step down the loss. The gradients are let go at once: the next step's activations need the room."""
    optimizer.zero_grad()
    loss.backward()
    ranks.average(parameter for group in optimizer.param_groups for parameter in group["params"])
    optimizer.step()
    optimizer.zero_grad()


def set_lr(optimizers: Iterable[Optimizer], share: float) -> None:
    """Sets the learning rates to a share of what they began with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])


def frozen_copy(model: Classifier) -> Classifier:
    """A copy in eval mode that takes no gradients: the teacher."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def channels_last(*networks: nn.Module) -> None:
    """Lays convolutions' weights out as the quicker kernels want them; no number changes.

    A classifier whose network can do with nothing but the usual order stays as it is.
    """
    for network in networks:
        if isinstance(network, Classifier) and network.contiguous:
            continue
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the weights inside: what is not used is not computed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
