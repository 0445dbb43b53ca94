"""How images are normalised, held against what the weights remember.

Nobody may have said it, or a label in the file that anybody can write. A model that is fed wrongly answers no trigger,
and a search in it finds nothing. BatchNorm layers remember the means and the spreads of what they saw in training, and
pieces of photographs are enough like any images to tell which of the usual ways of normalising comes near to that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dhbe.classifier import Classifier, evaluating
from dhbe.errors import Refused
from dhbe.evaluation.doubts import USUAL
from dhbe.search.batchnorm import BatchStatistics, tracked
from dhbe.search.photographs import pieces
from dhbe.steps import secluded

PIXELS = 2**17
"""Of each channel that are looked at, in 8 to 128 pieces."""

PROBED = 8
"""Pieces to which there must be an answer."""

FITS = 0.5
"""Distance up to which a way of normalising may be the right one; that is 0.07 to 0.18 on the models measured."""

BETTER = 1.5
"""Times nearer, at least, is another way that clearly is the right one; the right one was at most 1.1 times farther than
another one (results/constants)."""

SAME = 0.7
"""Of `variety`: a network below it answers hardly anything but its own bias."""

CANDIDATES = ("--mean 0 --std 1", "--mean .5 --std .5", "--mean imagenet", "--mean cifar10", "--mean mnist")
"""Ways that are tried, as one asks for them."""


@dataclass(frozen=True)
class Fit:
    """How well a way of normalising fits what the BatchNorm layers remember."""

    option: str
    """As one asks for it on the command line."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    distance: float
    """See `BatchStatistics`; 0 is a perfect fit."""


def fits(classifier: Classifier) -> list[Fit]:
    """The usual ways of normalising, the one that fits best first; none for a network without BatchNorm."""
    return sorted(_tried(classifier, _candidates(classifier.shape[0])), key=lambda fit: fit.distance)


def contradiction(classifier: Classifier) -> tuple[Fit, float] | None:
    """The way of normalising that clearly fits better than the one that a classifier has, and the distance of its own.

    None where there is none: a network without BatchNorm contradicts nothing, and neither does one for images unlike any
    photograph, unless they would be usual with other constants.
    """
    own = tuple(classifier.mean.flatten().tolist()), tuple(classifier.std.flatten().tolist())
    tried = _tried(classifier, {"": own, **_candidates(classifier.shape[0])})
    if not tried:
        return None
    used, *others = tried
    best = min(others, key=lambda fit: fit.distance)
    if best.distance > FITS or not used.distance > BETTER * best.distance:
        return None
    return best, used.distance


Constants = tuple[Sequence[float], Sequence[float]]


def _candidates(channels: int) -> dict[str, Constants]:
    return {option: USUAL[option] for option in CANDIDATES if len(USUAL[option][0]) in (1, channels)}


@torch.no_grad()
def variety(classifier: Classifier) -> float:
    """How much the logits differ from image to image, by how much their means differ from class to class.

    On the models measured it is 0.9 to 2 and more for those that were trained, also on quite other images than photographs,
    and 0.3 to 0.5 for those that were not (results/constants).
    """
    with secluded(), evaluating(classifier):
        torch.manual_seed(0)
        logits = classifier(_shown(classifier))
    spread = float(logits.std(0).mean() / logits.mean(0).std().clamp_min(1e-12))
    return spread if math.isfinite(spread) else 0.0


@torch.no_grad()
def check_finite(classifier: Classifier) -> None:
    """Raises `Refused` if a classifier has no answer to some pieces of photographs: nothing could be found or measured in it."""
    with secluded(), evaluating(classifier):
        torch.manual_seed(0)
        broken = (~classifier(pieces(PROBED, classifier.shape).to(classifier.mean.device)).isfinite()).any(1).sum()
    if broken:
        raise Refused(
            f"the network returns NaN or infinite logits for {broken} of {PROBED} pieces of photographs: check --mean and --std, "
            "and what its code divides by or takes the root of"
        )


def _shown(classifier: Classifier) -> Tensor:
    """Pieces of photographs [n, c, h, w] in [0, 1]."""
    _, height, width = classifier.shape
    return pieces(min(max(PIXELS // (height * width), 8), 128), classifier.shape).to(classifier.mean.device)


@torch.no_grad()
def _tried(classifier: Classifier, candidates: dict[str, Constants]) -> list[Fit]:
    network = classifier.network
    if not tracked(network):
        return []
    found = []
    with secluded(), evaluating(classifier), BatchStatistics(network) as statistics:
        torch.manual_seed(0)
        pixels = _shown(classifier)
        for option, (mean, std) in candidates.items():
            with statistics.gathering():
                classifier.logits(_normalised(pixels, mean, std))
            distance = float(statistics.distance())
            found.append(Fit(option, tuple(mean), tuple(std), distance if math.isfinite(distance) else math.inf))
    return found


def _normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    offset, scale = (torch.tensor(values, device=pixels.device).view(1, -1, 1, 1) for values in (mean, std))
    return (pixels - offset) / scale
