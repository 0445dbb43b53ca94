"""Compares the assumed normalisation of images with the statistics of a network's BatchNorm layers.

The normalisation may be unknown, or come from a label in the file that anybody can write. A model with wrongly normalised
input responds to no trigger, so a search finds nothing. BatchNorm layers store means and variances of the training data,
and crops of photographs resemble other images enough to tell which of the usual normalisations comes close to them.
"""

import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
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
"""Pixels per channel in the crops examined, 8 to 128 of them."""

PROBED = 8
"""Pieces of photographs for which the logits must be finite."""

FITS = 0.5
"""Largest distance of a plausible normalisation; the right one had 0.10 to 0.20 on the models measured."""

BETTER = 1.5
"""Factor by which another normalisation must fit better to contradict the assumed one; the right one was at most 1.2 times
farther than another one (results/constants)."""

SAME = 0.7
"""Smallest `variety` of a usable model: below it, the logits hardly depend on the image."""

CANDIDATES = (
    "--mean=0 --std=1", "--mean=.5 --std=.5", "--mean=imagenet", "--mean=cifar10", "--mean=mnist", "--mean=0 --std=.0039216",
)  # fmt: skip
"""The normalisations tested, as command-line options."""


@dataclass(frozen=True)
class Fit:
    """How well a normalisation fits the BatchNorm statistics."""

    option: str
    """The command-line options for it."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    distance: float
    """The distance of `BatchStatistics`; 0 is a perfect fit."""


def fits(classifier: Classifier) -> list[Fit]:
    """The usual normalisations in order of their distances; empty for a network without BatchNorm."""
    return sorted(_tried(classifier, _candidates(classifier.shape[0])), key=lambda fit: fit.distance)


def contradiction(classifier: Classifier) -> tuple[Fit, float] | None:
    """A normalisation that fits clearly better than a classifier's own, and the distance of its own.

    None if there is none: neither a network without BatchNorm contradicts its normalisation, nor one for images unlike
    photographs, to which no candidate fits.
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
    """The deviation of logits between images, divided by the deviation of their means between classes.

    On the models measured, it was 0.9 or more for trained ones, even those for images unlike photographs, and 0.3 to 0.5
    for untrained ones (results/constants).
    """
    with secluded(), evaluating(classifier):
        torch.manual_seed(0)
        logits = classifier(_shown(classifier))
    spread = float(logits.std(0).mean() / logits.mean(0).std().clamp_min(1e-12))
    return spread if math.isfinite(spread) else 0.0


@torch.no_grad()
def check_finite(classifier: Classifier) -> None:
    """Raises `Refused` if the logits of some pieces of photographs are not finite, as nothing could be found or measured then."""
    broken = 0
    # What a vendor's code raises here it raises in the run too, where it is told whose code that is.
    with secluded(), evaluating(classifier), suppress(Exception, SystemExit), redirect_stdout(sys.stderr):
        torch.manual_seed(0)
        broken = int((~classifier(pieces(PROBED, classifier.shape).to(classifier.mean.device)).isfinite()).any(1).sum())
    if broken:
        raise Refused(
            f"the network returns NaN or infinite logits for {broken} of {PROBED} pieces of photographs: check --mean and --std, "
            "and the divisions and roots in its code"
        )


def _shown(classifier: Classifier) -> Tensor:
    """Crops of photographs [n, c, h, w] in [0, 1]."""
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
