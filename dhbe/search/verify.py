"""Is a backdoor gone? A data-free search of two states of a classifier, on the same images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dhbe.classifier import Classifier
from dhbe.search.batchnorm import tracked
from dhbe.search.families import FAMILIES
from dhbe.search.scan import Watch, success_rate
from dhbe.search.search import Search
from dhbe.search.survey import Survey, SurveyState
from dhbe.steps import Precision, Round, Tell, channels_last, computing, frozen_copy, on, secluded, untold

RESTARTS = 2
"""Fresh searches in each state."""

ACTS = 0.2
"""Success rate from which a trigger counts as acting."""

CHANGED = 0.8
"""Agreement below which the model after counts as a different one."""

COMPARED = 512
"""Images on which the two states' predictions are compared."""


@dataclass(frozen=True)
class State:
    """The results of the searches in one state; all rates are in [0, 1]."""

    anomaly_index: float
    """The anomaly index, in this state, of the class that stood out most before."""
    success_rate: float
    """The success rate of the strongest trigger that was found for that class in the state before."""
    targeted: dict[str, float]
    """By family: the largest success rate of a trigger that was found for one class in this state."""
    untargeted: dict[str, float]
    """By family: the share of images whose class changes under the trigger that was found to change classes."""


@dataclass(frozen=True)
class Comparison:
    """Two states of a classifier."""

    suspected_class: int
    """The class that stands out most in the state before."""
    index: float
    """Its anomaly index in the state before."""
    agreement: float
    """The share of images to which both states assign the same class, in [0, 1]."""
    drift: float | None
    """How far BatchNorm means moved, as `drift` has it; None if the two cannot be compared."""
    before: State
    after: State

    def verdict(self, anomaly_threshold: float) -> Literal["nothing found", "answers", "changed", "quiet"]:
        """The verdict on the state after."""
        if self.index <= anomaly_threshold:
            return "nothing found"
        if self.after.success_rate >= ACTS or self.after.anomaly_index > anomaly_threshold:
            return "answers"
        return "changed" if self.agreement < CHANGED else "quiet"


def rounds(survey: Survey) -> int:
    """Maximum number of rounds of `compare`."""
    return survey.rounds + 2 * RESTARTS * survey.warm_up


def compare(
    before: Classifier,
    after: Classifier,
    survey: Survey,
    *,
    seed: int = 0,
    precision: Precision = "fp32",
    watch: Watch = lambda number, round: None,
    tell: Tell = untold,
) -> Comparison:
    """Searches both states; neither they nor the caller's random state are changed.

    Args:
        before: The suspect classifier.
        after: The cleaned classifier, with the same classes and image shape.
        survey: Hyperparameters of the search.
        seed: Seed of everything random.
        precision: bf16 runs the networks under autocast.
        watch: Called after every round.
        tell: Told of the work between rounds.
    """
    states, device, number = [frozen_copy(before), frozen_copy(after)], before.mean.device, 0
    channels_last(*states)

    def watched(round: Round) -> None:
        nonlocal number
        number += 1
        watch(number, round)

    with secluded(), on(device), computing(device, precision), torch.no_grad():
        torch.manual_seed(seed)
        survey_state = SurveyState(survey, before)
        with torch.enable_grad():
            for losses in survey.run(states[0], survey_state):
                watched(losses)
        survey.conclude(states[0], survey_state, tell)
        anomaly = survey_state.findings.anomaly[survey_state.findings.accusing]
        suspected = int(anomaly.amax(0).argmax())
        pixels, _ = survey_state.pool.sample(COMPARED)
        classes = [state(pixels).argmax(1) for state in states]
        return Comparison(
            suspected_class=suspected,
            index=float(anomaly.max()),
            agreement=float((classes[0] == classes[1]).float().mean()),
            drift=drift(*states),
            before=_searched(states[0], survey, survey_state, suspected, watched, tell),
            after=_searched(states[1], survey, survey_state, suspected, watched, tell),
        )


def _searched(
    model: Classifier, survey: Survey, state: SurveyState, suspected: int, watch: Callable[[Round], None], tell: Tell
) -> State:
    pixels, _ = state.pool.sample(survey.probe_images)
    answers = model(pixels)
    bank, accusing = state.bank, state.findings.accusing
    known = ((bank.strength > -torch.inf) & (bank.wanted == suspected)).nonzero().flatten()
    acting = [success_rate(model, bank.triggers(place[None]), suspected, pixels, answers) for place in known]
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(RESTARTS):
        with torch.enable_grad():
            search = survey.explore(model, state, watch, tell)
        _, anomaly = survey.index(model, search, state.pool)
        found.append((anomaly[accusing, suspected].amax(), _success_rates(model, search, pixels, answers)))
    best = torch.stack([rates for _, rates in found]).amax(0)
    names = [family.name for family in FAMILIES]
    return State(
        anomaly_index=float(torch.stack([most for most, _ in found]).amax()),
        success_rate=max(map(float, acting), default=0.0),
        targeted=dict(zip(names, best[:, :-1].amax(1).tolist(), strict=True)),
        untargeted=dict(zip(names, best[:, -1].tolist(), strict=True)),
    )


def _success_rates(model: Classifier, search: Search, pixels: Tensor, answers: Tensor) -> Tensor:
    """Success rates of each family's triggers [families, classes + 1]; the last column is the untargeted one's."""
    aims = torch.arange(search.aims)
    rates = [
        torch.stack([success_rate(model, family.triggers(aim[None]), int(aim), pixels, answers) for aim in aims])
        for family in search.families
    ]
    return torch.stack(rates)


def drift(before: Classifier, after: Classifier) -> float | None:
    """Mean absolute change of BatchNorm means over layers and channels, in standard deviations of the state before.

    None if the two have no BatchNorm layers, or not matching ones.
    """
    layers = tracked(before), tracked(after)
    if not layers[0] or len(layers[0]) != len(layers[1]):
        return None
    moved = []
    for old, new in zip(*layers, strict=True):
        if old.running_mean is None or new.running_mean is None or old.running_var is None:
            return None
        if old.running_mean.shape != new.running_mean.shape:
            return None
        scale = (old.running_var + old.eps).sqrt()
        moved.append(((new.running_mean - old.running_mean) / scale).abs().mean())
    return float(torch.stack(moved).mean())
