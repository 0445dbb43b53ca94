"""Is a backdoor gone? A data-free search of two states of a classifier, on the same images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier
from dhbe.run_state import Plain, RunState, Stateful
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
    run_state: RunState | None = None,
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
        run_state: State of an interrupted comparison with the same settings, to resume from; None starts a fresh one.
    """
    states, device, run_state = (frozen_copy(before), frozen_copy(after)), before.mean.device, run_state or RunState()
    channels_last(*states)
    with secluded(), on(device), computing(device, precision):
        torch.manual_seed(seed)
        work = _Work(survey, states[0])
        run_state.register(**work.parts())
        run_state.restore()
        for round in work.rounds(states, tell):
            run_state.advance()
            with secluded(), torch.device("cpu"):
                watch(run_state.round, round)
        return work.comparison(states)


class _Results(Plain):
    """What the fresh searches found, and how far they are."""

    def __init__(self, families: int, classes: int) -> None:
        self.surveyed = False
        """Whether the survey of the state before is concluded."""
        self.rounds = 0
        """Rounds of fresh searches done, over both states and all restarts."""
        self.anomaly = torch.zeros(2, RESTARTS)
        """The suspected class's anomaly in each state and search."""
        self.rates = torch.zeros(2, RESTARTS, families, classes + 1)
        """The success rate of each trigger found; the last column is the untargeted one's."""


class _Work:
    """A survey of the state before, then fresh searches in both states, on its images."""

    def __init__(self, survey: Survey, before: Classifier) -> None:
        self.survey, self.state = survey, SurveyState(survey, before)
        self.fresh = survey.search(before, away=True)
        self.results = _Results(len(FAMILIES), before.classes)

    def parts(self) -> dict[str, Stateful]:
        """Everything that changes, by name."""
        optimizers = {f"fresh_{kind.name}": each for kind, each in zip(FAMILIES, self.fresh.optimizers, strict=True)}
        fresh = nn.ModuleList(self.fresh.families)
        return {**self.state.parts(), "fresh": fresh, "results": self.results, **optimizers}

    def rounds(self, states: Sequence[Classifier], tell: Tell) -> Iterator[Round]:
        """Runs all searches, resuming where they were; yields the losses of each round."""
        survey, state, results = self.survey, self.state, self.results
        if not results.surveyed:
            yield from survey.run(states[0], state)
            survey.conclude(states[0], state, tell)
            results.surveyed = True
        while results.rounds < 2 * RESTARTS * survey.warm_up:
            search, done = divmod(results.rounds, survey.warm_up)
            which, restart = divmod(search, RESTARTS)
            if not done:
                self.fresh.restart(survey.search(states[0], away=True))
            losses = survey.step(self.fresh, states[which], state.pool)
            results.rounds += 1
            if results.rounds % survey.warm_up == 0:
                survey.cut(states[which], self.fresh, state.pool, tell)
                self._judge(states[which], which, restart)
            yield losses

    @torch.no_grad()
    def _judge(self, model: Classifier, which: int, restart: int) -> None:
        """Records what a fresh search found in one of the states."""
        _, anomaly = self.survey.index(model, self.fresh, self.state.pool)
        self.results.anomaly[which, restart] = anomaly[self.state.findings.accusing, self.suspected].amax()
        pixels, _ = self.state.pool.sample(self.survey.probe_images)
        self.results.rates[which, restart] = _success_rates(model, self.fresh, pixels, model(pixels))

    @property
    def suspected(self) -> int:
        """The class that stands out most in the state before."""
        findings = self.state.findings
        return int(findings.anomaly[findings.accusing].amax(0).argmax())

    @torch.no_grad()
    def comparison(self, states: Sequence[Classifier]) -> Comparison:
        """The result of all searches."""
        findings = self.state.findings
        pixels, _ = self.state.pool.sample(COMPARED)
        classes = [model(pixels).argmax(1) for model in states]
        before, after = (self._found(model, which) for which, model in enumerate(states))
        return Comparison(
            suspected_class=self.suspected,
            index=float(findings.anomaly[findings.accusing].max()),
            agreement=float((classes[0] == classes[1]).float().mean()),
            drift=drift(*states),
            before=before,
            after=after,
        )

    def _found(self, model: Classifier, which: int) -> State:
        pixels, _ = self.state.pool.sample(self.survey.probe_images)
        answers, bank = model(pixels), self.state.bank
        known = ((bank.strength > -torch.inf) & (bank.wanted == self.suspected)).nonzero().flatten()
        acting = [success_rate(model, bank.triggers(each[None]), self.suspected, pixels, answers) for each in known]
        best = self.results.rates[which].amax(0)
        names = [family.name for family in FAMILIES]
        return State(
            anomaly_index=float(self.results.anomaly[which].amax()),
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
