"""From the statistics of each class to one piece of evidence against it."""

import torch
from torch import Tensor

from dhbe.classifier import Classifier
from dhbe.search.narrowed import Narrowed
from dhbe.search.photographs import pieces
from dhbe.search.search import middle_and_deviation
from dhbe.search.statistics import head, margins

LEAST_CLASSES = 4
"""Of two classes both lie equally far from their median, and of three the MAD is the smaller of two gaps."""

MOST = 20.0
"""An index above this says no more: the MAD of a few classes may be tiny by chance."""

HEAD_ALONE = 5.0
"""Index of the head's signature that accuses by itself: of normal values 2 % would reach it, and warps show nowhere else."""

TOGETHER = 1.15
"""Mean of log(1 + index) over the statistics that accuses; one threshold serves 4 classes and 100 alike."""

ACCUSED = 1.0
"""Evidence from which a class is accused: a scan is unclear."""

CONVICTED = 1.25
"""Evidence from which an erasure that found no trigger of the class says that it still answers. A clean network of digits
reached 1.11, a warp in the zoo 1.38: one model on each side, so this is a choice and no calibration."""


STATISTICS = {
    "head": "what each class gains when all pooled features rise alike: the head's weights alone",
    "margin_noise": "how far images of noise can be led to each class",
    "margin_images": "how far natural images can be led to each class",
    "margin_pattern": "how far one faint pattern leads natural images to each class",
}
"""What each is, by name, in the order of `evidence`."""


@torch.no_grad()
def evidence(model: Classifier) -> Tensor:
    """The robust index of every class by each statistic [statistics, classes]; NaN where one cannot tell.

    Args:
        model: The suspect, in eval mode. Of a narrowed one, what stands for the other classes has no index.
    """
    whole, labels = _seen(model)
    natural = pieces(margins.IMAGES, model.shape).to(model.mean.device)
    signature = head.signature(whole)
    indices = [
        None if signature is None else robust_index(signature),
        robust_index(margins.from_noise(whole, labels)),
        robust_index(margins.from_images(whole, labels, natural)),
        robust_index(margins.by_one_pattern(whole, labels, natural)),
    ]
    if indices[0] is not None:
        indices[0] = indices[0][labels]
    found = torch.full((len(indices), model.classes), torch.nan)
    for row, index in zip(found, indices, strict=True):
        if index is not None:
            row[: len(labels)] = index
    return found


@torch.no_grad()
def rankings(model: Classifier) -> list[Tensor]:
    """What tells soon which classes of many to look at: values of each class [classes], the larger the more suspicious."""
    every, signature = torch.arange(model.classes), head.signature(model)
    natural = pieces(margins.FEW_IMAGES, model.shape).to(model.mean.device)
    noise = torch.rand(margins.FEW_IMAGES, *model.shape)
    raised = [
        margins.by_one_pattern(model, every, natural, margins.FEW_STEPS),
        margins.raised(model, every, noise, steps=margins.FEW_STEPS),
    ]
    return raised if signature is None else [*raised, signature]


def _seen(model: Classifier) -> tuple[Classifier, Tensor]:
    """The whole classifier, and the classes of it that are looked at."""
    if isinstance(model, Narrowed):
        return model.whole, model.labels
    return model, torch.arange(model.classes)


def robust_index(values: Tensor) -> Tensor | None:
    """How far each class stands above the others: (v - median) / (1.4826 MAD), [classes].

    Returns:
        None where it cannot tell: fewer than `LEAST_CLASSES` classes, values that are not finite, or no spread.
    """
    if len(values) < LEAST_CLASSES or not values.isfinite().all():
        return None
    middle, deviation = middle_and_deviation(values.double())
    return ((values - middle) / deviation).float() if deviation > 0 else None


def fused(indices: Tensor) -> Tensor:
    """Evidence against each class [classes] by all statistics [statistics, classes]; 0 where none can tell.

    Several moderate statistics that name the same class accuse it, and so does the head's signature alone. The logarithm
    keeps one enormous index from drowning the others.
    """
    together = indices.clamp(0, MOST).log1p().nanmean(0) / TOGETHER
    return torch.maximum(together, indices[0].nan_to_num() / HEAD_ALONE).nan_to_num()
