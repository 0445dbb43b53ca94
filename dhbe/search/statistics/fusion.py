"""Fuses the statistics of each class into one value of evidence against it."""

import torch
from torch import Tensor

from dhbe.classifier import Classifier
from dhbe.search.narrowed import Narrowed
from dhbe.search.photographs import pieces
from dhbe.search.search import middle_and_deviation
from dhbe.search.statistics import head, margins
from dhbe.steps import Tell, untold

LEAST_CLASSES = 4
"""Fewer give no robust index: two classes are equally far from their median, and of three the MAD is the smaller gap."""

MOST = 20.0
"""Cap on indices: larger ones mean nothing more, as the MAD of a few classes may be tiny by chance."""

HEAD_ALONE = 5.0
"""Index of the head signature that accuses by itself: 2 % of normal values would reach it, and warps show nowhere else."""

TOGETHER = 1.15
"""Mean of log(1 + index) over the statistics from which they accuse; one threshold for 4 classes and for 100."""

ACCUSED = 1.0
"""Evidence from which a class is accused, which makes the verdict of a scan `unclear`."""

CONVICTED = 1.25
"""Evidence from which an erasure that found no trigger for the class has the verdict `still answers`. A clean network of
digits reached 1.11, a warp in the zoo 1.38: with one model on each side, this is a choice and no calibration."""


STATISTICS = {
    "head": "what each class gains when all pooled features rise alike: the head's weights alone",
    "margin_noise": "how far images of noise can be led to each class",
    "margin_images": "how far natural images can be led to each class",
    "margin_pattern": "how far one faint pattern leads natural images to each class",
}
"""Description of each statistic by name, in the order of `evidence`."""


@torch.no_grad()
def evidence(model: Classifier, tell: Tell = untold) -> Tensor:
    """The robust index of every class by each statistic [statistics, classes]; NaN where it is undefined.

    Args:
        model: The suspect model, in eval mode. If it is `Narrowed`, the class that stands for the others has no index.
        tell: Told of each statistic.
    """
    whole, labels = _seen(model)
    natural = pieces(margins.IMAGES, model.shape).to(model.mean.device)
    signature = head.signature(whole)
    index = None if signature is None else robust_index(signature)
    found = torch.full((len(STATISTICS), model.classes), torch.nan)
    if index is not None:
        found[0, : len(labels)] = index[labels]
    measures = (
        lambda: margins.from_noise(whole, labels),
        lambda: margins.from_images(whole, labels, natural),
        lambda: margins.by_one_pattern(whole, labels, natural),
    )
    for number, measure in enumerate(measures, 1):
        tell("statistics of all classes", number, len(measures))
        if (index := robust_index(measure())) is not None:
            found[number, : len(labels)] = index
    return found


@torch.no_grad()
def rankings(model: Classifier) -> list[Tensor]:
    """Quick statistics that preselect classes of a model with many: values [classes] of each; larger is more suspicious."""
    every, signature = torch.arange(model.classes), head.signature(model)
    natural = pieces(margins.FEW_IMAGES, model.shape).to(model.mean.device)
    noise = torch.rand(margins.FEW_IMAGES, *model.shape)
    raised = [
        margins.by_one_pattern(model, every, natural, margins.FEW_STEPS),
        margins.raised(model, every, noise, steps=margins.FEW_STEPS),
    ]
    return raised if signature is None else [*raised, signature]


def _seen(model: Classifier) -> tuple[Classifier, Tensor]:
    """The whole classifier, and its classes that are examined [k]."""
    if isinstance(model, Narrowed):
        return model.whole, model.labels
    return model, torch.arange(model.classes)


def robust_index(values: Tensor) -> Tensor | None:
    """How far each class stands above the others [classes]: (v - median) / (1.4826 MAD).

    Returns:
        None if undefined: fewer than `LEAST_CLASSES` classes, values that are not finite, or no spread.
    """
    if len(values) < LEAST_CLASSES or not values.isfinite().all():
        return None
    middle, deviation = middle_and_deviation(values.double())
    return ((values - middle) / deviation).float() if deviation > 0 else None


def fused(indices: Tensor) -> Tensor:
    """Evidence against each class [classes] from the indices of all statistics [statistics, classes]; 0 if all are NaN.

    Several moderate indices of the same class accuse it, and so does a large one of the head signature alone. The logarithm
    limits the influence of a single huge index.
    """
    together = indices.clamp(0, MOST).log1p().nanmean(0) / TOGETHER
    return torch.maximum(together, indices[0].nan_to_num() / HEAD_ALONE).nan_to_num()
