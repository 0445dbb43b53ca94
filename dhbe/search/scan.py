"""Does a classifier answer a trigger? A search without data, and what it came to for each class."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dhbe.classifier import Classifier
from dhbe.search.families import FAMILIES, Overlay
from dhbe.search.narrowed import SEARCHED, Narrowed, narrowed
from dhbe.search.statistics import rankings
from dhbe.search.survey import Survey, SurveyState
from dhbe.steps import Precision, Round, channels_last, computing, frozen_copy, on, secluded

MIDDLE, SLOPE = 4.0, 1.3
"""Of the logistic curve in the logarithm of the index, fitted on one half of the calibration set (docs/method.md)."""

Watch = Callable[[int, Round], None]
"""Called after every round with its number, from 1."""


@dataclass(frozen=True, eq=False)
class Found:
    """The trigger that stands out most for each class that was searched."""

    indices: Tensor
    """How far each class stands out [classes], in robust standard deviations of its family."""
    families: list[str]
    """The family of each class's trigger."""
    margins: Tensor
    """The margin of the class under it, in logits [classes]."""
    success_rates: Tensor
    """The share of the images of other classes that it leads there [classes]."""
    triggers: Overlay
    """The triggers."""
    evidence: Tensor
    """The index of each class by each statistic that needs no trigger [statistics, classes]; NaN: it cannot tell."""
    fused: Tensor
    """What these come to [classes]; from `statistics.ACCUSED` on a class is accused."""
    pixels: Tensor
    """Some of the images that they were tried on [n, c, h, w]."""
    labels: Tensor
    """The classes that were searched, in ascending order [classes]."""

    @property
    def suspected_class(self) -> int:
        """The class that stands out most."""
        return int(self.labels[self.indices.argmax()])


def scan(
    model: Classifier,
    survey: Survey,
    *,
    seed: int = 0,
    precision: Precision = "fp32",
    watch: Watch = lambda number, round: None,
) -> Found:
    """Searches a classifier, which stays as it is, as does the caller's random state.

    Args:
        model: The suspect classifier.
        survey: Hyperparameters of the search.
        seed: Seed of everything random.
        precision: bf16 runs the network under autocast.
        watch: Called after every round.
    """
    teacher, device = frozen_copy(model), model.mean.device
    channels_last(teacher)
    with secluded(), on(device), computing(device, precision):
        torch.manual_seed(seed)
        if teacher.classes > SEARCHED:
            teacher = narrowed(teacher, rankings(teacher))
        state = SurveyState(survey, teacher)
        for number, round in enumerate(survey.run(teacher, state), 1):
            watch(number, round)
        survey.conclude(teacher, state)
        return _found(teacher, survey, state)


@torch.no_grad()
def _found(teacher: Classifier, survey: Survey, state: SurveyState) -> Found:
    findings, count = state.findings, teacher.classes - isinstance(teacher, Narrowed)
    labels = torch.arange(count)
    pixels, answers = state.pool.sample(survey.probe_images)
    anomaly = findings.anomaly.where(findings.accusing[:, None], -torch.inf)[:, :count]
    best = anomaly.argmax(0)
    triggers = [state.search.families[family].triggers(labels[[label]]) for label, family in enumerate(best.tolist())]
    rates = [success_rate(teacher, each, label, pixels, answers) for label, each in enumerate(triggers)]
    return Found(
        indices=anomaly.amax(0),
        families=[FAMILIES[family].name for family in best.tolist()],
        margins=findings.margins[:, :count].gather(0, best[None])[0],
        success_rates=torch.stack(rates),
        triggers=Overlay.joined(triggers),
        evidence=findings.evidence[:, :count],
        fused=findings.fused[:count],
        pixels=pixels,
        labels=teacher.labels if isinstance(teacher, Narrowed) else labels,
    )


@torch.no_grad()
def success_rate(model: Classifier, trigger: Overlay, label: int, pixels: Tensor, answers: Tensor) -> Tensor:
    """The share of images [n, c, h, w] of other classes that a trigger leads to `label`; 0 where there are none.

    Args:
        model: What is triggered.
        trigger: One trigger.
        label: Its class. The number after the last one stands for any but the usual.
        pixels: The images.
        answers: Logits of them without the trigger [n, classes].
    """
    usual = answers.argmax(1)
    others = usual != label
    if not others.any():
        return torch.zeros(())
    led = model(trigger(pixels[others])).argmax(1)
    return (led != usual[others] if label == answers.shape[1] else led == label).float().mean()


def probability(index: float) -> float:
    """How likely a classifier whose anomaly index is so large is backdoored, if half of them are.

    >>> [round(probability(index), 2) for index in (1.0, 5.0, 50.0)]
    [0.14, 0.57, 0.96]
    """
    return 1 / (1 + (MIDDLE / max(index, 1e-6)) ** SLOPE)
