"""How fast a cleaned model relearns its backdoor, which may be forgotten or merely suppressed.

Superficial safety (Min et al. 2024, arXiv:2410.09838): purified models often relearn from a handful of triggered images.
"""

import copy

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dhbe.classifier import Classifier


def relearned(classifier: Classifier, pixels: Tensor, labels: Tensor, *, lr: float, steps: int) -> Classifier:
    """A copy of a classifier, finetuned on a few images by full-batch SGD with momentum 0.9.

    BatchNorm statistics are fixed and dropout is off, as the images are too few.

    Args:
        classifier: The classifier; it is not changed.
        pixels: Triggered and clean images [n, c, h, w] in [0, 1].
        labels: Labels to be learned, int64 [n].
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
