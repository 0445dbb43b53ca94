"""What the BatchNorm layers of a teacher remember of its training data: its means and variances, layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier

BatchNorm = nn.modules.batchnorm._BatchNorm


def tracked(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The BatchNorm layers that keep running statistics, in order of registration."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of [n, c, ...], over all else."""
    x = x.float()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    variance, mean = torch.var_mean(x, dim=axes, correction=0)
    return mean, variance


class BatchStatistics:
    """How far a batch lies from what the teacher's BatchNorm layers remember (Yin et al. 2020, eq. 4, per layer).

    The distance of a layer is the mean over channels of ((mu - mu_l) / sigma_l)^2 + (sigma / sigma_l - 1)^2.
    A teacher without BatchNorm has distance 0.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self._layers = tracked(teacher)
        self._moments: list[tuple[Tensor, Tensor, nn.Module]] = []
        self._open = False

    def __enter__(self) -> "BatchStatistics":
        self._hooks = [layer.register_forward_pre_hook(self._see) for layer in self._layers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._open:
            self._moments.append((*moments(inputs[0]), layer))

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
            scale = (layer.running_var + layer.eps).sqrt()
            shift = ((mean - layer.running_mean) / scale).square()
            stretch = ((variance + layer.eps).sqrt() / scale - 1).square()
            total = total + (shift + stretch).mean()
        return total / max(1, len(self._moments))


@torch.no_grad()
def corrected(student: Classifier, teacher: Classifier, draw: Callable[[], Tensor], batches: int) -> None:
    """Sets the student's running statistics to the teacher's, moved by what training changed.

    Generated images are not real ones: statistics taken on them alone are off by what sets the two kinds apart. The
    teacher's are off in the same way, and what its real ones are is known; so the difference between student and
    teacher on the same generated images is added to the teacher's running means, and their ratio multiplies its
    running variances.
    """
    mine, theirs = tracked(student), tracked(teacher)
    for layer in theirs:
        layer.train()  # both sides under their batches' own statistics, as the remembered ones were taken
    sums: dict[nn.Module, list[Tensor]] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, variance = moments(inputs[0])
        held = sums.setdefault(layer, [torch.zeros_like(mean), torch.zeros_like(mean)])
        held[0] += mean / batches
        held[1] += variance / batches

    hooks = [layer.register_forward_pre_hook(see) for layer in mine + theirs]
    momenta = [layer.momentum for layer in mine]
    for layer in mine + theirs:
        layer.momentum = 0.0  # the running statistics stand still
    for _ in range(batches):
        pixels = draw()
        teacher(pixels)
        student(pixels)
    for hook in hooks:
        hook.remove()
    for layer, reference, momentum in zip(mine, theirs, momenta, strict=True):
        layer.momentum = momentum
        reference.eval()
        (mean, variance), (mean_t, variance_t) = sums[layer], sums[reference]
        layer.running_mean.copy_(reference.running_mean + mean - mean_t)
        layer.running_var.copy_(reference.running_var * (variance + layer.eps) / (variance_t + layer.eps))
