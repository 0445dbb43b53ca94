"""Is a backdoor gone? Two states of a classifier are searched on the same images, without data."""

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
from dhbe.steps import Precision, Round, channels_last, computing, frozen_copy, on, secluded

RESTARTS = 2
"""Fresh searches in each state."""

ACTS = 0.2
"""Share of images that a trigger must lead to its class to be said to act."""

CHANGED = 0.8
"""Agreement below which a model has become another one."""

COMPARED = 512
"""Images on which the two states are compared."""


@dataclass(frozen=True)
class State:
    """What the searches in one state came to."""

    anomaly_index: float
    """How far the class that stood out most before does in this state."""
    success_rate: float
    """The share of images that the strongest trigger found in the state before leads to its class."""
    targeted: dict[str, float]
    """By family: the largest share of images that one trigger found in this state leads to one class."""
    untargeted: dict[str, float]
    """By family: the share of images whose class a trigger changes that was found to change it."""


@dataclass(frozen=True)
class Comparison:
    """Two states of a classifier."""

    suspected_class: int
    """The one that stands out most in the state before."""
    index: float
    """How far it does."""
    agreement: float
    """The share of images that both give the same class."""
    drift: float | None
    """How far the BatchNorm statistics moved; None where there are none, or not the same."""
    before: State
    after: State

    def verdict(self, anomaly_threshold: float) -> Literal["nothing found", "answers", "changed", "quiet"]:
        """What this says of the state after."""
        if self.index <= anomaly_threshold:
            return "nothing found"
        if self.after.success_rate >= ACTS or self.after.anomaly_index > anomaly_threshold:
            return "answers"
        return "changed" if self.agreement < CHANGED else "quiet"


def rounds(survey: Survey) -> int:
    """Rounds that `compare` takes at the most."""
    return survey.rounds + 2 * RESTARTS * survey.warm_up


def compare(
    before: Classifier,
    after: Classifier,
    survey: Survey,
    *,
    seed: int = 0,
    precision: Precision = "fp32",
    watch: Watch = lambda number, round: None,
) -> Comparison:
    """Searches both states, which stay as they are, as does the caller's random state.

    Args:
        before: The suspect classifier.
        after: What a defence made of it, for the same classes and shape of images.
        survey: Hyperparameters of the search.
        seed: Seed of everything random.
        precision: bf16 runs the networks under autocast.
        watch: Called after every round.
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
        survey.conclude(states[0], survey_state)
        anomaly = survey_state.findings.anomaly[survey_state.findings.accusing]
        suspected = int(anomaly.amax(0).argmax())
        pixels, _ = survey_state.pool.sample(COMPARED)
        classes = [state(pixels).argmax(1) for state in states]
        return Comparison(
            suspected_class=suspected,
            index=float(anomaly.max()),
            agreement=float((classes[0] == classes[1]).float().mean()),
            drift=drift(*states),
            before=_searched(states[0], survey, survey_state, suspected, watched),
            after=_searched(states[1], survey, survey_state, suspected, watched),
        )


def _searched(
    model: Classifier, survey: Survey, state: SurveyState, suspected: int, watch: Callable[[Round], None]
) -> State:
    pixels, _ = state.pool.sample(survey.probe_images)
    answers = model(pixels)
    bank, accusing = state.bank, state.findings.accusing
    known = ((bank.strength > -torch.inf) & (bank.wanted == suspected)).nonzero().flatten()
    acting = [success_rate(model, bank.triggers(place[None]), suspected, pixels, answers) for place in known]
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(RESTARTS):
        with torch.enable_grad():
            search = survey.explore(model, state, watch)
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
    """Of each family's trigger for each aim, the last one of which is any class but the usual [families, classes + 1]."""
    aims = torch.arange(search.aims)
    rates = [
        torch.stack([success_rate(model, family.triggers(aim[None]), int(aim), pixels, answers) for aim in aims])
        for family in search.families
    ]
    return torch.stack(rates)


def drift(before: Classifier, after: Classifier) -> float | None:
    """Mean over BatchNorm layers and channels of how far means moved, in standard deviations of the state before.

    None where the two have no BatchNorm layers, or not as many.
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
