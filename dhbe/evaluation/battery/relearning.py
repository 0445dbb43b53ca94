"""How fast a cleaned model learns its backdoor again: it may be forgotten, or only not shown.

Superficial safety (Min et al. 2024, arXiv:2410.09838): purified models often relearn from a handful of triggered images.
"""

import copy

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dhbe.classifier import Classifier


def relearned(classifier: Classifier, pixels: Tensor, labels: Tensor, *, lr: float, steps: int) -> Classifier:
    """A copy that was finetuned on a few images, all of them in each step, by SGD with momentum 0.9.

    BatchNorm keeps its statistics, and dropout is off: so few images could only spoil them.

    Args:
        classifier: It is not changed.
        pixels: [n, c, h, w] in [0, 1], triggered and clean images.
        labels: int64 [n], what the copy is to say of them.
        lr: Learning rate.
        steps: Number of steps.
    """
    learner = copy.deepcopy(classifier).eval().requires_grad_()
    optimizer = torch.optim.SGD(learner.parameters(), lr=lr, momentum=0.9)
    pixels, labels = pixels.to(classifier.mean.device), labels.to(classifier.mean.device)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(learner(pixels), labels).backward()
        optimizer.step()
    return learner
