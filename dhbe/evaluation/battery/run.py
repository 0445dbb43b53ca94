"""The whole battery: forms of the trigger, reactivation, relearning."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from dhbe.attacks import Target
from dhbe.attacks.triggers import Trigger
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.errors import Refused
from dhbe.evaluation import metrics
from dhbe.evaluation.battery.forms import forms
from dhbe.evaluation.battery.reactivation import perturbed, universal_perturbation
from dhbe.evaluation.battery.relearning import relearned
from dhbe.evaluation.evidence import Evidence
from dhbe.records import Battery, FormRates, Reactivation, Relearning
from dhbe.steps import Tell, channels_last, frozen_copy, untold
from dhbe.training import predict

Aim = Callable[[Tensor], Tensor]
"""Maps true classes, int64 [n], to the target classes of a trigger."""


@dataclass(frozen=True)
class Effort:
    """The effort of the battery. With the defaults, a WRN-16-1 takes about two minutes on one CPU core."""

    images: int = 1000
    """Maximum number of images, chosen by the seed; half are searched on, the other half measured on."""
    others: int = 3
    """Number of other classes that the target class is compared with."""
    epsilon: float = 0.05
    """Largest change of any value by the universal perturbation, pixels in [0, 1]."""
    steps: int = 60
    """Steps of the search for the perturbation."""
    batch: int = 64
    """Images per step of that search."""
    counts: tuple[int, ...] = (10, 20, 50)
    """Numbers of triggered images that copies relearn from, with as many clean ones."""
    lr: float = 0.01
    """Learning rate of the relearning."""
    lessons: int = 30
    """Steps of the relearning, each on all images."""


def battery(
    before: Classifier,
    after: Classifier,
    evidence: Evidence,
    *,
    effort: Effort = Effort(),
    seed: int = 0,
    tell: Tell = untold,
) -> Battery:
    """Measures how much of a backdoor is left, by what an attacker or a careless user may still do.

    The trigger is tested in other forms; a small perturbation of all images is optimised to have its effect; and copies of
    the cleaned model relearn it from few images. The last two are compared with the same for other classes, to distinguish
    a backdoor from what is possible with every network, and no images are measured on that were searched on or learned
    from. Neither model is changed; all random choices depend on the seed alone.

    Args:
        before: The backdoored model.
        after: The cleaned model.
        evidence: Images, the true trigger and its target.
        effort: The effort.
        seed: Seed of the choice of images, positions and other classes.
        tell: Told of each part.

    Raises:
        Refused: There is no trigger, there are fewer than two images, or they do not fit the models.
        Failed: A model's logits are not finite.
    """
    trigger, target = evidence.trigger, evidence.target
    if trigger is None or target is None:
        raise Refused("measuring what is left of a backdoor needs its trigger: give --trigger and --target")
    if len(evidence.images) < 2:
        raise Refused("measuring what is left of a backdoor needs at least two images: give more data")
    chance = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(evidence.images), generator=chance)[: effort.images]
    shown = evidence.images.subset(chosen)
    searched, rest = shown.subset(slice(len(shown) // 2)), shown.subset(slice(len(shown) // 2, None))
    variants, aims = forms(trigger, chance), _aims(evidence, target, effort.others, chance)
    progress = _Progress(tell, len(variants) + (2 + len(effort.counts)) * len(aims))
    models = frozen_copy(before), frozen_copy(after)
    channels_last(*models)
    return Battery(
        forms=_formed(models, shown, evidence.source, variants, aims[0], progress),
        reactivation=_reactivated(
            [_Subject(model, rest, evidence.source) for model in models], searched, aims, effort, seed, progress
        ),
        relearning=[*_relearned(_Subject(models[1], rest, evidence.source), searched, trigger, aims, effort, progress)],
        searched=len(searched),
        n=len(rest),
        forms_n=len(shown),
    )


class _Subject:
    """A model and the images that it is measured on."""

    def __init__(self, classifier: Classifier, images: Images, source: int | None) -> None:
        self.classifier, self.images, self.source = classifier, images, source
        self.clean = predict(classifier, images)

    def success(self, change: Callable[[Tensor], Tensor], aim: Aim) -> float | None:
        """The share of correctly classified images that `change` leads to their target classes; None if none counts."""
        ours = _for_whom(self.images, self.source)
        clean, labels = self.clean[ours], self.images.labels[ours]
        goal = aim(labels)
        if not ((clean == labels) & (labels != goal)).any():
            return None
        return metrics.attack_success(clean, predict(self.classifier, self.images, change)[ours], labels, goal)


class _Progress:
    def __init__(self, tell: Tell, total: int) -> None:
        self._tell, self._total, self._done = tell, total, 0

    def step(self) -> None:
        self._done += 1
        self._tell("measuring what is left", self._done, self._total)


def _for_whom(images: Images, source: int | None) -> Tensor:
    """The images that the trigger is for, bool [n]."""
    return torch.ones_like(images.labels, dtype=torch.bool) if source is None else images.labels == source


def _aims(evidence: Evidence, target: Target, others: int, generator: torch.Generator) -> list[Aim]:
    """The trigger's own target, then random others."""
    classes = evidence.images.classes
    if target == "next":  # the others are larger shifts
        steps = 2 + torch.randperm(max(0, classes - 2), generator=generator)
        return [lambda labels, by=by: (labels + by) % classes for by in (1, *steps[:others].tolist())]
    drawn = torch.randperm(classes, generator=generator).tolist()
    wrong = [each for each in drawn if each not in (target, evidence.source)]
    return [lambda labels, to=to: torch.full_like(labels, to) for to in (target, *wrong[:others])]


def _formed(
    models: Sequence[Classifier],
    shown: Images,
    source: int | None,
    variants: dict[str, Trigger],
    aim: Aim,
    progress: _Progress,
) -> list[FormRates]:
    before, after = (_Subject(model, shown, source) for model in models)
    found = []
    for name, form in variants.items():
        found.append(FormRates(form=name, before=before.success(form, aim), after=after.success(form, aim)))
        progress.step()
    return found


def _reactivated(
    subjects: Sequence[_Subject], searched: Images, aims: Sequence[Aim], effort: Effort, seed: int, progress: _Progress
) -> Reactivation | None:
    rates: list[list[float | None]] = []
    for subject in subjects:
        found = []
        for aim in aims:
            goal = aim(searched.labels)
            use = _for_whom(searched, subject.source) & (goal != searched.labels)
            if not use.any():
                return None
            perturbation = universal_perturbation(
                subject.classifier, searched.subset(use), goal[use], epsilon=effort.epsilon, steps=effort.steps,
                batch=effort.batch, generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            found.append(subject.success(lambda pixels, by=perturbation: perturbed(pixels, by), aim))
            progress.step()
        rates.append(found)
    before, after = rates
    return Reactivation(
        epsilon=effort.epsilon, before=before[0], after=after[0],
        others_before=_middle(before[1:]), others_after=_middle(after[1:]),
    )  # fmt: skip


def _relearned(
    after: _Subject, searched: Images, trigger: Trigger, aims: Sequence[Aim], effort: Effort, progress: _Progress
) -> Iterator[Relearning]:
    for count in effort.counts:
        asr, acc = [], []
        for aim in aims:
            lesson = _lesson(searched, trigger, aim, count, after.source)
            if lesson is not None:
                learner = relearned(after.classifier, *lesson, lr=effort.lr, steps=effort.lessons)
                subject = _Subject(learner, after.images, after.source)
                asr.append(subject.success(trigger, aim))
                acc.append(metrics.accuracy(subject.clean, after.images.labels))
            progress.step()
        if len(asr) == len(aims):  # otherwise there were too few images
            yield Relearning(images=count, asr=asr[0], others=_middle(asr[1:]), acc=acc[0])


def _lesson(
    searched: Images, trigger: Trigger, aim: Aim, count: int, source: int | None
) -> tuple[Tensor, Tensor] | None:
    """`count` triggered images with target labels, and as many clean ones with their own; None if there are too few."""
    goal = aim(searched.labels)
    poisoned = (_for_whom(searched, source) & (goal != searched.labels)).nonzero().flatten()[:count]
    others = torch.ones(len(searched), dtype=torch.bool)
    others[poisoned] = False
    clean = others.nonzero().flatten()[:count]
    if min(len(poisoned), len(clean)) < count:
        return None
    pixels = torch.cat([trigger(searched.float(poisoned)), searched.float(clean)])
    return pixels, torch.cat([goal[poisoned], searched.labels[clean]])


def _middle(rates: Sequence[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return median(known) if known else None
