"""Does a classifier respond to a trigger? A data-free search and its result for each class."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dhbe.classifier import Classifier
from dhbe.run_state import RunState
from dhbe.search.families import FAMILIES, Overlay
from dhbe.search.narrowed import SEARCHED, Narrowed, narrowed
from dhbe.search.statistics import rankings
from dhbe.search.survey import Survey, SurveyState
from dhbe.steps import Precision, Round, Tell, channels_last, computing, frozen_copy, on, secluded, untold

MIDDLE, SLOPE = 4.0, 1.3
"""Parameters of the logistic curve in the logarithm of the index, fitted on half of the calibration set (docs/method.md)."""

Watch = Callable[[int, Round], None]
"""Called after every round with its number, from 1, and its losses."""


@dataclass(frozen=True, eq=False)
class Found:
    """The result of a scan: for each class searched, the trigger with the largest anomaly."""

    indices: Tensor
    """Anomaly index of each class [classes], in robust standard deviations of its trigger's family."""
    families: list[str]
    """The family of each class's trigger."""
    margins: Tensor
    """Mean margin of each class under its trigger, in logits [classes]."""
    success_rates: Tensor
    """The share of images of other classes that each trigger leads to its class [classes], in [0, 1]."""
    triggers: Overlay
    """The triggers, one for each class."""
    evidence: Tensor
    """The index of each class by each trigger-free statistic [statistics, classes]; NaN: undefined."""
    fused: Tensor
    """The fused evidence against each class [classes]; from `statistics.ACCUSED` on a class is accused."""
    pixels: Tensor
    """The images on which success rates were measured [n, c, h, w], in [0, 1]."""
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
    tell: Tell = untold,
    run_state: RunState | None = None,
) -> Found:
    """Searches a classifier; neither it nor the caller's random state is changed.

    Args:
        model: The suspect classifier.
        survey: Hyperparameters of the search.
        seed: Seed of everything random.
        precision: bf16 runs the network under autocast.
        watch: Called after every round.
        tell: Told of the work after the rounds.
        run_state: State of an interrupted scan with the same settings, to resume from; None starts a fresh one.
    """
    teacher, device, run_state = frozen_copy(model), model.mean.device, run_state or RunState()
    channels_last(teacher)
    with secluded(), on(device), computing(device, precision):
        torch.manual_seed(seed)
        if teacher.classes > SEARCHED:
            teacher = narrowed(teacher, rankings(teacher))
        state = SurveyState(survey, teacher)
        run_state.register(**state.parts())
        run_state.restore()
        for round in survey.run(teacher, state):
            run_state.advance()
            with secluded(), torch.device("cpu"):
                watch(run_state.round, round)
        survey.conclude(teacher, state, tell)
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
    """The share of images of other classes that a trigger leads to `label`, a scalar; 0 if there are no such images.

    Args:
        model: The model.
        trigger: One trigger.
        label: Its class; `classes`, the number after the last one, means any class but the predicted one.
        pixels: The images [n, c, h, w] in [0, 1].
        answers: Their logits without the trigger [n, classes].
    """
    usual = answers.argmax(1)
    others = usual != label
    if not others.any():
        return torch.zeros(())
    led = model(trigger(pixels[others])).argmax(1)
    return (led != usual[others] if label == answers.shape[1] else led == label).float().mean()


def probability(index: float) -> float:
    """The probability that a classifier with this anomaly index is backdoored, for a prior of one half.

    >>> [round(probability(index), 2) for index in (1.0, 5.0, 50.0)]
    [0.14, 0.57, 0.96]
    """
    return 1 / (1 + (MIDDLE / max(index, 1e-6)) ** SLOPE)
