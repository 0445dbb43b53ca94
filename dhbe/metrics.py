"""Figures of merit: pure functions of predictions. Integers are counted and divided; nothing is averaged in floats."""

import math
from statistics import NormalDist
from typing import Literal, get_args

import torch
from torch import Tensor

from dhbe.errors import Refused

Among = Literal["model", "victim", "all"]


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """ACC: the share of images classified right.

    Args:
        predicted: Predicted classes, int64 [n].
        labels: True classes, int64 [n].

    Raises:
        Refused: There are no images, or the lengths differ.

    >>> accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]))
    0.75
    """
    _check(predicted, labels)
    return _share(predicted == labels, torch.ones_like(labels, dtype=torch.bool), "the data set is empty")


def attack_success(
    clean: Tensor,
    triggered: Tensor,
    labels: Tensor,
    target: int,
    base: Tensor | None = None,
    among: Among = "model",
) -> float:
    """ASR: the share of images of other classes that are classified as the target once triggered (eq. 9).

    Args:
        clean: Classes that the evaluated model predicts without the trigger, int64 [n].
        triggered: Classes that it predicts with the trigger, int64 [n].
        labels: True classes, int64 [n].
        target: The attacker's class. Its own images never count.
        base: Classes that the backdoored model predicts without the trigger, int64 [n]; only for "victim".
        among: Images that count: those that the evaluated model gets right untriggered ("model", as the released
            script does), those that the backdoored model gets right ("victim", as the text says), or "all".

    Raises:
        Refused: No image counts, the lengths differ, or `base` is missing.
    """
    if among not in get_args(Among):
        raise Refused(f"no ASR among {among!r}; there are {', '.join(get_args(Among))}")
    _check(clean, triggered, labels)
    counted = labels != target
    if among == "model":
        counted = counted & (clean == labels)
    elif among == "victim":
        if base is None:
            raise Refused("the ASR among images that the victim gets right needs the victim's predictions")
        _check(base, labels)
        counted = counted & (base == labels)
    return _share(triggered == target, counted, f"no image outside class {target} counts for the ASR (among: {among})")


def robust_accuracy(triggered: Tensor, labels: Tensor, target: int) -> float:
    """RA: the share of images of other classes that are still given their true class once triggered.

    Args:
        triggered: Classes predicted with the trigger, int64 [n].
        labels: True classes, int64 [n].
        target: The attacker's class. Its own images never count.

    Raises:
        Refused: There is no image of another class, or the lengths differ.
    """
    _check(triggered, labels)
    return _share(triggered == labels, labels != target, f"no image outside class {target}")


def der(acc_before: float, acc_after: float, asr_before: float, asr_after: float) -> float:
    """DER, the defence effectiveness rating of BackdoorBench (Zhu et al. 2023): 1 is best, 0.5 is no effect.

    (max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2, all as fractions.

    >>> der(acc_before=0.9, acc_after=0.9, asr_before=1.0, asr_after=0.0)
    1.0
    """
    return (max(0.0, asr_before - asr_after) - max(0.0, acc_before - acc_after) + 1) / 2


def wilson(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share `count` / `total`: its lower and upper end.

    Raises:
        Refused: `total` is 0 or `count` is not between 0 and `total`.
    """
    if not 0 <= count <= total or total == 0:
        raise Refused(f"{count} of {total} is no share")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    reach = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _check(*classes: Tensor) -> None:
    shapes = [list(each.shape) for each in classes]
    if any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
        raise Refused(f"predictions and labels must be of one length [n], not {shapes}")


def _share(hit: Tensor, counted: Tensor, empty: str) -> float:
    total = int(counted.sum())
    if total == 0:
        raise Refused(empty)
    return int((hit & counted).sum()) / total
