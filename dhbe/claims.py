"""What a file says of itself, held against what its weights remember.

Our own label in the header of a safetensors file tells how images are normalised, and anybody can write one. A model
that is fed wrongly answers no trigger, and a search in it finds nothing. BatchNorm layers remember the mean and the
spread of what they saw in training, and photographs are enough like any images to tell which of the usual ways of
normalising comes near to that, and which does not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dhbe.classifier import Classifier
from dhbe.data import KNOWN
from dhbe.search.batchnorm import Layer, moments, tracked
from dhbe.search.photographs import pieces
from dhbe.steps import secluded

PHOTOGRAPHS = 128
"""Pieces of photographs, which are nobody's training data."""

FAR = 1.0
"""Of `_distance`: from here on images do not look like those in training. Models of the zoo, fed rightly, have 0.2 at the
most; with a standard deviation that is wrong by a factor of four it is 1.1 to 1.8."""

BETTER = 4.0
"""Times nearer, at least, must another usual way of normalising come."""

Constants = tuple[Sequence[float], Sequence[float]]


def contradicted(classifier: Classifier) -> bool:
    """Whether the first BatchNorm layer contradicts the mean and standard deviation that a classifier normalises with.

    A network without BatchNorm contradicts nothing, and neither does one for images unlike any photograph, unless they
    would be usual under other constants.
    """
    if not tracked(classifier.network):
        return False
    with secluded(), torch.no_grad():
        torch.manual_seed(0)
        pixels = pieces(PHOTOGRAPHS, classifier.shape).to(classifier.mean.device)
        claimed = _distance(classifier, (pixels - classifier.mean) / classifier.std)
        if not claimed > FAR:
            return False
        others = [_distance(classifier, _normalised(pixels, constants)) for constants in _usual(classifier.shape[0])]
    return claimed > BETTER * min(others)


def _usual(channels: int) -> list[Constants]:
    """The constants of known data sets, pixels as they are, and pixels from -1 to 1."""
    known = [(data.mean, data.std) for data in KNOWN.values() if data.mean and data.std]
    return [((0.0,), (1.0,)), ((0.5,), (0.5,)), *(each for each in known if len(each[0]) in (1, channels))]


def _normalised(pixels: Tensor, constants: Constants) -> Tensor:
    mean, std = (torch.tensor(values, device=pixels.device).view(1, -1, 1, 1) for values in constants)
    return (pixels - mean) / std


def _distance(classifier: Classifier, images: Tensor) -> float:
    """Of normalised images [n, c, h, w] from those in training, as the first BatchNorm layer that they reach sees them.

    The mean over its channels of the squared shift, in standard deviations, and of the squared logarithm of the spread.
    """

    def see(layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, variance = moments(inputs[0])
        kept_mean, kept = layer.running_mean, layer.running_var
        assert isinstance(layer, Layer)
        assert isinstance(kept_mean, Tensor)
        assert isinstance(kept, Tensor)
        kept = kept + layer.eps
        shift = (mean - kept_mean).square() / kept
        stretch = ((variance + layer.eps) / kept).log() / 2
        raise _Seen(float((shift + stretch.square()).mean()))

    hooks = [layer.register_forward_pre_hook(see) for layer in tracked(classifier.network)]
    try:
        classifier.network(images)
    except _Seen as seen:
        return seen.distance
    finally:
        for hook in hooks:
            hook.remove()
    return 0.0


class _Seen(Exception):  # what comes after the first layer is not needed
    def __init__(self, distance: float) -> None:
        self.distance = distance
