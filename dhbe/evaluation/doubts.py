"""Likely causes of an accuracy no better than chance, which is rarely the model's fault."""

import torch
from scipy.optimize import linear_sum_assignment

from dhbe.classifier import Classifier
from dhbe.data import NORMALISATION, Images
from dhbe.evaluation import metrics
from dhbe.evaluation.evidence import Evidence
from dhbe.records import Measures
from dhbe.training import predict

LOOKED_AT = 500
"""Maximum number of images on which alternatives are tested."""

NUMBERS = 11
"""Number of classes from which the order of their numbers differs from that of their names."""

FEWEST = 20
"""Minimum number of images for a diagnosis."""

ABOVE_CHANCE = 0.05
"""Accuracy that still counts as chance, as a share of the range from chance to 1."""

CLEARLY = 0.3
"""Improvement of accuracy from which an alternative is proposed."""

USUAL = {"--mean=0 --std=1": ((0.0,), (1.0,)), "--mean=.5 --std=.5": ((0.5,), (0.5,))}
USUAL |= {"--mean=0 --std=.0039216": ((0.0,), (1 / 255,))}  # networks that take 0..255, and may normalise themselves
USUAL |= {f"--mean={name}": constants for name, constants in NORMALISATION.items()}
"""Mean and standard deviation by the command-line options for them."""


def doubts(classifier: Classifier, evidence: Evidence, measures: Measures) -> list[str]:
    """One line with the likely cause if the accuracy is no better than chance, or much better in another order; else none.

    Args:
        classifier: The classifier measured.
        evidence: The data it was measured on.
        measures: The result.
    """
    chance, acc = 1 / classifier.classes, measures.acc
    if acc is None or len(evidence.images) < FEWEST or acc > 1 - CLEARLY:
        return []
    no_better = acc <= chance + ABOVE_CHANCE * (1 - chance)
    order = torch.randperm(len(evidence.images), generator=torch.Generator().manual_seed(0))
    some = evidence.images.subset(order[:LOOKED_AT])
    said = f"ACC {acc:.1%}{' is no better than chance' if no_better else ''}"
    if (matched := _matched(classifier, some)) > acc + CLEARLY:
        sorted_ = (
            "; torchvision's ImageFolder sorts folders as words, 0, 1, 10, 11, ..., 2: list them so"
            if classifier.classes >= NUMBERS and all(name.isdecimal() for name in evidence.images.names)
            else ""
        )
        return [
            f"{said}, but with the classes in another order it is {matched:.1%}: check --class-names, or the labels{sorted_}"
        ]
    if not no_better:
        return []
    shares = {option: _read_as(classifier, some, *constants) for option, constants in USUAL.items()}
    best = max(shares, key=lambda option: shares[option])
    if shares[best] > acc + CLEARLY:
        return [f"{said}, but with {best} it is {shares[best]:.1%}: check how the images are normalised"]
    return [f"{said}: check --mean, --std and --input, --arch, and whether data and model have the same classes"]


def _matched(classifier: Classifier, images: Images) -> float:
    """The accuracy under the best one-to-one assignment of the data's classes to the model's."""
    size = max(classifier.classes, images.classes)
    counts = torch.zeros(size, size, dtype=torch.int64)
    counts.index_put_((images.labels, predict(classifier, images)), torch.ones(1, dtype=torch.int64), accumulate=True)
    rows, columns = linear_sum_assignment(-counts.numpy())
    return int(counts[rows, columns].sum()) / len(images)


def _read_as(classifier: Classifier, images: Images, mean: tuple[float, ...], std: tuple[float, ...]) -> float:
    """The accuracy with another normalisation; 0 if it does not fit the channels."""
    if len(mean) not in (1, classifier.shape[0]):
        return 0.0
    other = Classifier(
        classifier.network, shape=classifier.shape, classes=classifier.classes, mean=mean, std=std,
        softmax=classifier.softmax, output=classifier.output, contiguous=classifier.contiguous,
    ).to(classifier.mean.device)  # fmt: skip
    return metrics.accuracy(predict(other, images), images.labels)
