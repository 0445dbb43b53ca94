"""Tells architectures with identical tensors apart, by the statistics of their BatchNorm layers.

Max-pooling after the stem, for example, has no tensors, but raises the means of the inputs of later layers.
"""

from collections.abc import Mapping, Sequence

import torch

from dhbe import networks
from dhbe.checkpoint import State, load_into
from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.search.batchnorm import BatchStatistics
from dhbe.search.photographs import pieces

SEEN = 64
"""Crops of photographs on which each architecture is tested."""

CLEARLY, NEAR = 0.5, 0.3
"""A distance is decisive if it is below this share of the second best, and small: otherwise normalisation may be wrong."""


def distances(
    archs: Sequence[str], state: State, shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, float]:
    """The distance of natural images from the BatchNorm statistics, for each architecture.

    Args:
        archs: Names in `networks.ZOO` that `state` fits.
        state: The weights.
        shape: Image shape (channels, height, width).
        classes: Number of classes.
        mean: As for `Classifier`.
        std: As for `Classifier`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = pieces(SEEN, shape)
    found = {}
    for arch in archs:
        network = networks.build(arch, classes, shape)
        load_into(network, state)
        model = Classifier(network, shape=shape, classes=classes, mean=mean, std=std).eval()
        with torch.no_grad(), BatchStatistics(model) as statistics:
            with statistics.gathering():
                model(images)
            found[arch] = float(statistics.distance())
    return found


def told(found: Mapping[str, float]) -> str | None:
    """The architecture with a decisively smallest distance; None if there is none.

    >>> told({"a": 0.2, "b": 0.9}), told({"a": 0.2, "b": 0.3}), told({"a": 1.2, "b": 2.9})
    ('a', None, None)
    """
    first, second = sorted(found, key=lambda arch: found[arch])[:2]
    return first if found[first] < min(NEAR, CLEARLY * found[second]) else None
