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
    """Perturbs images so that the classifier misclassifies them.

    Args:
        classifier: Used in its current mode; its gradients are not changed.
        pixels: [n, c, h, w] in [0, 1].
        labels: int64 [n].
        epsilon: Largest change of any value (L-infinity), pixels in [0, 1].
        step: Change of a value in one step.
        steps: Number of steps, each along the sign of the gradient of the cross-entropy.
        generator: Draws the random start inside the ball; None means torch's global one.

    Returns:
        Images [n, c, h, w] in [0, 1], within `epsilon` of the given ones in every value.
    """
    low, high = (pixels - epsilon).clamp_min(0), (pixels + epsilon).clamp_max(1)
    start = torch.rand(pixels.shape, generator=generator).to(pixels) * 2 - 1
    found = (pixels + epsilon * start).clamp(low, high)
    for _ in range(steps):
        found.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(classifier(found), labels), found)
        found = (found.detach() + step * gradient.sign()).clamp(low, high)
    return found.detach()
