"""Adversarial images by projected gradient descent (Madry et al. 2018, arXiv:1706.06083)."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dhbe.classifier import Classifier


def pgd(
    classifier: Classifier,
    pixels: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    step: float,
    steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images near the given ones that the classifier takes for anything but their labels.

    Args:
        classifier: Used in the mode it is in; its gradients are left alone.
        pixels: [n, c, h, w] in [0, 1].
        labels: int64 [n].
        epsilon: Largest change of any value (L-infinity).
        step: Change of a value in one step.
        steps: Number of steps, each along the sign of the gradient of the cross-entropy.
        generator: Draws the start inside the ball; None takes torch's global one.

    Returns:
        Images [n, c, h, w] in [0, 1], none of whose values is farther than `epsilon` from its own.
    """
    low, high = (pixels - epsilon).clamp_min(0), (pixels + epsilon).clamp_max(1)
    start = torch.rand(pixels.shape, generator=generator).to(pixels) * 2 - 1
    found = (pixels + epsilon * start).clamp(low, high)
    for _ in range(steps):
        found.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(classifier(found), labels), found)
        found = (found.detach() + step * gradient.sign()).clamp(low, high)
    return found.detach()
