"""Shared parts of all training code: scopes for device, seed and precision, losses, and an optimiser step."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from dhbe import ranks
from dhbe.classifier import Classifier

Precision = Literal["fp32", "bf16"]
"""Precision of the networks' computations."""

Round = dict[str, Tensor]
"""The losses and other results of one round: scalars by name, on the device."""

Tell = Callable[[str, int, int], None]
"""Is told of work between rounds, which may take minutes: what it is, the step, counted from 1, and the number of steps."""


def untold(what: str, done: int, total: int) -> None:
    """Tells nobody."""


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Creates tensors on the device inside; a GPU also becomes the current one, for random states and streams."""
    with torch.device(device), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def secluded() -> AbstractContextManager[None]:
    """Restores the caller's random states on exit, also those of all GPUs, which `torch.manual_seed` would change."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else [])


def computing(device: torch.device, precision: Precision) -> torch.autocast:
    """Runs networks inside in a precision, by autocast.

    The weight cache is disabled: it outlives a step and would keep using the weights of the first one.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def gap(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of logits [n, classes] over batch and classes (eq. 2 and eq. 7)."""
    return F.l1_loss(a, b)


def variation(images: Tensor) -> Tensor:
    """Sum over the four neighbour directions of the L2 norm of the whole batch's differences: a scalar, not averaged.

    Args:
        images: Normalised images [n, c, h, w].
    """
    across, down = images[..., :, 1:] - images[..., :, :-1], images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    if ranks.size() > 1:  # norms over the whole batch, which is spread over the processes
        squares = [each.square().sum() for each in (across, down, falling, rising)]
        return ranks.total(torch.stack(squares)).sqrt().sum()
    return across.norm() + down.norm() + falling.norm() + rising.norm()


def lay(patches: Tensor, height: int, width: int, *, each: bool) -> Tensor:
    """Places patches [n, c, p, p] at random positions in images of zeros [n, c, height, width].

    With `each`, every patch gets its own position; otherwise, as in the paper, all of a batch share one. Patches are placed
    by two products with 0/1 matrices, so that shapes are fixed and nothing synchronises with the device.
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
    """Takes one optimiser step on the loss, a scalar. Frees the gradients to make room for the next step's activations."""
    optimizer.zero_grad()
    loss.backward()
    ranks.average(parameter for group in optimizer.param_groups for parameter in group["params"])
    optimizer.step()
    optimizer.zero_grad()


def set_lr(optimizers: Iterable[Optimizer], share: float) -> None:
    """Sets the learning rates to `share` times their initial values."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])


def stepped(done: float) -> float:
    """The papers' schedule: the factor on the learning rates after a share `done` of a run, 1, then 0.1, then 0.01."""
    return 1.0 if done < 0.6 else 0.1 if done < 0.8 else 0.01


def frozen_copy(model: Classifier) -> Classifier:
    """A copy in eval mode whose parameters do not require gradients, such as a teacher."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def channels_last(*networks: nn.Module) -> None:
    """Converts convolution weights to channels-last memory format, for faster kernels; values do not change.

    A classifier whose network requires contiguous tensors is left unchanged.
    """
    for network in networks:
        if isinstance(network, Classifier) and network.contiguous:
            continue
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disables gradients of the weights inside, to save their computation."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
