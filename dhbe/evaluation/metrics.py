"""Metrics as pure functions of predictions, exact: integer counts are divided, no floats are averaged."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, get_args

import torch
from torch import Tensor

from dhbe.errors import Refused

Among = Literal["model", "victim", "all"]


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """ACC: the share of images classified correctly.

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
    target: int | Tensor,
    base: Tensor | None = None,
    among: Among = "model",
) -> float:
    """ASR: the share of images of other classes that are classified as the target class with the trigger (eq. 9).

    Args:
        clean: Classes that the evaluated model predicts without the trigger, int64 [n].
        triggered: Classes that it predicts with the trigger, int64 [n].
        labels: True classes, int64 [n].
        target: The target class, or that of each image, int64 [n] (all-to-all). Images of it never count.
        base: Classes that the backdoored model predicts without the trigger, int64 [n]; only for "victim".
        among: Images that count: those that the evaluated model classifies correctly without the trigger ("model", as in
            the released script), those that the backdoored model does ("victim", as in the text), or "all".

    Raises:
        Refused: No image counts, the lengths differ, or `base` is missing.
    """
    if among not in get_args(Among):
        raise Refused(f"no ASR among {among!r}; available: {', '.join(get_args(Among))}")
    _check(clean, triggered, labels)
    counted = labels != target
    if among == "model":
        counted = counted & (clean == labels)
    elif among == "victim":
        if base is None:
            raise Refused("the ASR among images that the victim classifies correctly needs the victim's predictions")
        _check(base, labels)
        counted = counted & (base == labels)
    outside = f"outside class {_one(target)}"
    return _share(triggered == target, counted, f"no image {outside} counts for the ASR (among: {among})")


def goals(labels: Tensor, target: int | Literal["next"], classes: int) -> Tensor:
    """The target class of each image, int64 [n]; "next" is its own class plus one.

    >>> goals(torch.tensor([0, 1, 2]), "next", 3).tolist(), goals(torch.tensor([0, 1, 2]), 2, 3).tolist()
    ([1, 2, 0], [2, 2, 2])
    """
    return (labels + 1) % classes if target == "next" else torch.full_like(labels, target)


def robust_accuracy(triggered: Tensor, labels: Tensor, target: int | Tensor) -> float:
    """RA: the share of images of other classes that are classified correctly with the trigger.

    Args:
        triggered: Classes predicted with the trigger, int64 [n].
        labels: True classes, int64 [n].
        target: The target class, or that of each image, int64 [n]. Images of it never count.

    Raises:
        Refused: There is no image of another class, or the lengths differ.
    """
    _check(triggered, labels)
    return _share(triggered == labels, labels != target, f"no image outside class {_one(target)}")


def per_class(hit: Tensor, counted: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """The share of hits among the images of each class that count; None for a class of which none counts.

    Args:
        hit: Which images are hits, bool [n].
        counted: Which images count, bool [n].
        labels: True classes, int64 [n].
        classes: Number of classes.

    Raises:
        Refused: The lengths differ.

    >>> per_class(torch.tensor([True, False, True]), torch.tensor([True, True, True]), torch.tensor([0, 0, 2]), 3)
    [0.5, None, 1.0]
    """
    _check(hit, counted, labels)
    totals = labels[counted].bincount(minlength=classes).tolist()
    hits = labels[counted & hit].bincount(minlength=classes).tolist()
    return [right / total if total else None for right, total in zip(hits, totals, strict=True)]


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
        raise Refused(f"{count} of {total} is not a share: count must be from 0 to a positive total")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    reach = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def bootstrap(values: Sequence[float], confidence: float = 0.95, draws: int = 10_000) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean over runs (Efron 1979), such as seeds.

    Args:
        values: One value per run, at least two.
        confidence: Share of the resampled means between the two ends.
        draws: Number of resamples, drawn with a fixed seed.

    Raises:
        Refused: There are fewer than two values, or one is not finite.
    """
    figures = torch.tensor(values, dtype=torch.float64)
    if len(figures) < 2 or not figures.isfinite().all():
        raise Refused(f"an interval over runs needs at least two finite values, not {list(values)}")
    index = torch.randint(len(figures), (draws, len(figures)), generator=torch.Generator().manual_seed(0))
    tail = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = figures[index].mean(1).quantile(tail).tolist()
    return low, high


def _one(target: int | Tensor) -> str:
    """The target in words."""
    told = {target} if isinstance(target, int) else set(target.tolist())
    return str(told.pop()) if len(told) == 1 else "of its target"


def _check(*classes: Tensor) -> None:
    shapes = [list(each.shape) for each in classes]
    if any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
        raise Refused(f"predictions and labels must have the same length [n], not {shapes}")


def _share(hit: Tensor, counted: Tensor, empty: str) -> float:
    total = int(counted.sum())
    if total == 0:
        raise Refused(empty)
    return int((hit & counted).sum()) / total
