"""The data-free survey of an untouched classifier: images that it is familiar with, and triggers that it responds to."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint

from dhbe import settings
from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.generators import NOISE, PixelGenerator, check_generated
from dhbe.run_state import Plain, RunState, Stateful
from dhbe.search.batchnorm import BatchStatistics, imbalance, tracked
from dhbe.search.excerpts import Excerpting
from dhbe.search.families import FAMILIES, Bounds, Excerpts, Overlay
from dhbe.search.image_pool import ImagePool
from dhbe.search.narrowed import Narrowed
from dhbe.search.photographs import pieces
from dhbe.search.search import Search, Squares, anomalies, baseline_margin, middle_and_deviation
from dhbe.search.statistics import CONVICTED, STATISTICS, evidence, fused
from dhbe.search.trigger_bank import BankSettings, TriggerBank
from dhbe.settings import Setting
from dhbe.steps import Round, Tell, channels_last, descend, set_lr, untold

EXCERPTS = FAMILIES.index(Excerpts)

AT_ONCE = 2**20
"""Pixel values of crops drawn at a time."""


class Findings(Plain):
    """The results and the progress of a survey.

    Args:
        families: Number of trigger families.
        classes: Number of the model's classes.
        rounds: Rounds of the search before a second look.
    """

    def __init__(self, families: int, classes: int, rounds: int) -> None:
        self.rounds_done, self.rounds = 0, rounds
        self.margins = torch.zeros(families, classes)
        """Mean margin of each class under its trigger in the untouched model, in logits [families, classes]."""
        self.anomaly = torch.zeros(families, classes)
        """How far each class stands out in each family, in robust standard deviations [families, classes]."""
        self.outliers = torch.zeros(families, classes, dtype=torch.bool)
        """Where that is significant, bool [families, classes]."""
        self.evidence = torch.full((len(STATISTICS), classes), torch.nan)
        """The index of each class by each trigger-free statistic [statistics, classes]; NaN: undefined."""
        self.left = torch.zeros(())
        """How far the suspected classes still stood out in the last fresh search of a student, a scalar."""

    @property
    def suspected(self) -> Tensor:
        """Which classes stand out, bool [classes]."""
        return self.outliers.any(0)

    @property
    def backdoored(self) -> bool:
        """Whether a class stands out."""
        return bool(self.outliers.any())

    @property
    def sought(self) -> Tensor:
        """Which triggers are worth keeping, bool [families, classes]: those that stand out, or all if none does."""
        return self.outliers if self.backdoored else torch.ones_like(self.outliers)

    @property
    def natural(self) -> Tensor:
        """The median margin of each family in the untouched model [families]."""
        return self.margins.quantile(0.5, dim=1)

    def standing(self, margins: Tensor, family: int = EXCERPTS) -> Tensor:
        """How far margins stand out from those of the classes that are not suspected, in the untouched model.

        Args:
            margins: Margins of triggers of any class, in logits [n] or a scalar.
            family: Index of the family whose triggers they are compared with; squares are compared with excerpts.
        """
        others = self.margins[family][~self.suspected] if not self.suspected.all() else self.margins[family]
        middle, deviation = middle_and_deviation(others)
        return (margins - middle) / deviation.clamp_min(1e-6)

    @property
    def fused(self) -> Tensor:
        """The fused evidence against each class [classes]; from `statistics.ACCUSED` on it is accused."""
        return fused(self.evidence)

    @property
    def unexplained(self) -> Tensor:
        """Classes with strong evidence by statistics but no trigger that stands out, bool [classes]."""
        return (self.fused >= CONVICTED) & ~self.suspected

    @property
    def accusing(self) -> Tensor:
        """Which families may accuse a model, bool [families]."""
        return torch.tensor([family.accuses for family in FAMILIES])


class SurveyState:
    """Everything that changes in a survey."""

    def __init__(self, survey: "Survey", model: Classifier) -> None:
        channels, side, _ = model.shape
        self.generator = PixelGenerator(side, channels)
        self.generate = Adam(self.generator.parameters(), survey.lr_images, fused=True)
        self.search = survey.search(model)
        self.pool = ImagePool(survey.pool_size, model.shape, model.classes, survey.pool_bytes)
        self.bank = TriggerBank(survey.bank, model.shape, model.classes)
        self.findings = Findings(len(FAMILIES), model.classes, survey.warm_up)
        channels_last(self.generator)

    def parts(self) -> dict[str, Stateful]:
        """Everything that changes, by name."""
        optimizers = {f"seek_{kind.name}": each for kind, each in zip(FAMILIES, self.search.optimizers, strict=True)}
        return {
            "generator": self.generator, "generate": self.generate, "families": nn.ModuleList(self.search.families),
            "pool": self.pool, "bank": self.bank, "findings": self.findings, **optimizers,
        }  # fmt: skip

    def close(self, run_state: RunState) -> None:
        """Releases the generator, which is no longer needed once the pool holds its images."""
        run_state.release("generator", "generate")
        del self.generator, self.generate


@dataclass(frozen=True)
class Survey:
    """The search of an untouched model, with its hyperparameters."""

    warm_up: Annotated[int, Setting("rounds of training the image generator and searching for triggers", least=1)] = 60
    search_batch: Annotated[int, Setting("images per forward pass of the search", least=1)] = 128
    images_per_class: Annotated[int, Setting("images per class in a step of the search", least=1)] = 6
    least_images: Annotated[
        int,
        Setting(
            "minimum number of images per step, however few the classes, and per pass, however small the batch", least=2
        ),
    ] = 64
    lr_images: Annotated[float, Setting("learning rate of the image generator (Adam)")] = 1e-3
    generator_batch: Annotated[int, Setting("images per step of the generator", least=2)] = 64
    balance: Annotated[float, Setting("weight of class balance among the generated images")] = 1.0
    pool_size: Annotated[
        int, Setting("images in the pool, on which triggers are searched for and a student is trained", least=1)
    ] = 4096
    pool_bytes: Annotated[
        int, Setting("maximum size of the pool in bytes; with large images it holds fewer", least=1)
    ] = 2**28
    judged_images: Annotated[
        int,
        Setting("images on which anomalies are measured; with 64, chance alone changes them by one", least=1),
    ] = 256
    anomaly_threshold: Annotated[
        float, Setting("anomaly above which a class is suspected, in robust standard deviations")
    ] = 3.6
    smallest_spread: Annotated[
        float, Setting("lower bound of the margins' deviation, in standard deviations of the model's logits")
    ] = 0.25
    whole_image_share: Annotated[
        float, Setting("share of the largest anomaly that a whole-image trigger must exceed to be restricted")
    ] = 1 / 3
    unsure: Annotated[
        tuple[float, float],
        Setting("range of the largest anomaly that may be due to chance, so that the search takes a second look"),
    ] = (2.5, 10.0)
    second_rounds: Annotated[int, Setting("rounds of the second look, and of refining triggers that stand out")] = 20
    second_images: Annotated[int, Setting("factor on the images per step in the second look", least=1)] = 3
    second_lr: Annotated[float, Setting("factor on the learning rates in the second look and in refining")] = 0.3
    bank_images: Annotated[int, Setting("images on which the triggers found are tested at the end", least=2)] = 16
    probe_images: Annotated[int, Setting("images on which a trigger's success rate is measured", least=1)] = 64
    bounds: Bounds = field(default_factory=Bounds)
    squares: Squares = field(default_factory=Squares)
    excerpting: Excerpting = field(default_factory=Excerpting)
    bank: BankSettings = field(default_factory=BankSettings)

    @property
    def rounds(self) -> int:
        """Maximum number of rounds of the search in an untouched model."""
        return self.warm_up + self.second_rounds

    def check(self, shape: Shape) -> None:
        """Checks the settings and whether images of shape (c, h, w) are supported.

        Raises:
            Refused: They are not, or a setting is out of bounds.
        """
        check_generated(shape)
        self.bounds.check(shape)
        settings.check(self)

    def search(self, model: Classifier, *, away: bool = False) -> Search:
        """A fresh search with a trigger for each class; with `away`, also one for any class but the usual one."""
        return Search(model, self.bounds, at_once=max(self.search_batch, self.least_images), away=away)

    def run(self, teacher: Classifier, state: SurveyState, pictures: Sequence[Tensor] | None = None) -> Iterator[Round]:
        """Trains the image generator and searches for triggers, resuming from `state`; `conclude` evaluates the result.

        Args:
            teacher: In eval mode, without gradients.
            state: Updated in place.
            pictures: Natural images that the pool is cut from (see `pieces`).

        Yields:
            The losses of each round.
        """
        findings = state.findings
        if not findings.rounds_done:
            self._fill(teacher, state.pool, pictures)
        with BatchStatistics(teacher) as statistics:
            while findings.rounds_done < self.warm_up:
                losses = self._familiarise(teacher, state, statistics) if tracked(teacher) else {}
                losses |= self.step(state.search, teacher, state.pool)
                findings.rounds_done += 1
                yield losses
        if findings.rounds_done == self.warm_up:
            least, most = self.unsure
            if least < self.index(teacher, state.search, state.pool)[1].max() < most:
                findings.rounds += self.second_rounds
                set_lr(state.search.optimizers, self.second_lr)
        while findings.rounds_done < findings.rounds:
            losses = self.step(state.search, teacher, state.pool, self.second_images)
            findings.rounds_done += 1
            yield losses
        set_lr(state.search.optimizers, 1.0)
        if tracked(teacher):
            state.pool.renew(state.generator, teacher)

    @staticmethod
    def _fill(teacher: Classifier, pool: ImagePool, pictures: Sequence[Tensor] | None) -> None:
        """Fills the pool with crops of pictures."""
        some = max(1, AT_ONCE // math.prod(teacher.shape))
        for first in range(0, len(pool), some):
            drawn = pieces(min(some, len(pool) - first), teacher.shape, pictures)
            pool.fill(drawn.to(teacher.mean.device), teacher, first)

    def _familiarise(self, teacher: Classifier, state: SurveyState, statistics: BatchStatistics) -> Round:
        """Takes one generator step towards images that match the teacher's BatchNorm statistics."""
        with statistics.gathering():
            # Recomputes the generator's activations: together with the teacher's they were the peak memory of a run.
            noise = torch.randn(self.generator_batch, NOISE)
            drawn = checkpoint(state.generator, noise, use_reentrant=False, preserve_rng_state=False)
            answer = teacher(drawn)
        loss = statistics.distance()
        descend(state.generate, loss + self.balance * imbalance(answer))
        return {"bn_loss": loss}

    def step(self, search: Search, model: Classifier, pool: ImagePool, more: int = 1) -> Round:
        """Takes one step for each family, on `more` times as many images as usual; returns the mean margins by name."""
        count = more * max(self.least_images, self.images_per_class * model.classes)
        return {
            f"margin_{kind.name}": seek(search, model, number, pool.sample(count)[0])
            for number, kind in enumerate(FAMILIES)
            if kind.sought
        }

    def cut(self, model: Classifier, search: Search, pool: ImagePool, tell: Tell = untold) -> None:
        """Cuts the squares of a finished search."""
        self.excerpting.cut(model, excerpts_of(search), pool, tell)

    def hunt(self, model: Classifier, state: SurveyState, label: int, tell: Tell = untold) -> tuple[Overlay, Tensor]:
        """The strongest triggers for one class that can be found quickly, and their mean margins in logits [n].

        Plain squares are tested where the strongest trigger lies: an excerpt of a deep image shows more than the trigger,
        and a student that ignores it may still respond to the plain original.
        """
        found, margins = self.excerpting.hunt(model, label, state.pool, excerpts_of(state.search).side, tell)
        pixels, _ = state.pool.sample(self.squares.square_images)
        plain, reached = self.squares.tried(model, found[[int(margins.argmax())]], label, pixels)
        return Overlay.joined([found, plain]), torch.cat([margins, reached])

    @torch.no_grad()
    def conclude(self, teacher: Classifier, state: SurveyState, tell: Tell = untold) -> None:
        """Evaluates the search: determines which classes stand out, and fills the bank with the first triggers.

        With a large network this takes minutes, so each step is told.
        """
        pool, bank, findings = state.pool, state.bank, state.findings
        findings.evidence = evidence(teacher, tell)
        self.cut(teacher, state.search, pool, tell)
        findings.margins, findings.anomaly = self.index(teacher, state.search, pool)
        findings.outliers = self.outliers(findings.anomaly)
        if findings.backdoored:
            self._refine(state.search, teacher, pool, findings.sought, tell)
        each = zip(state.search.families, findings.margins, findings.sought, strict=True)
        for number, (family, reached, sought) in enumerate(each, 1):
            tell("testing the triggers found", number, len(FAMILIES))
            wanted = sought.nonzero().flatten()
            triggers = family.triggers(wanted)
            bank.take(triggers, wanted, reached[wanted])
            if findings.backdoored and family.compact:
                for place, label in enumerate(wanted.tolist()):
                    pixels, _ = pool.sample(self.squares.square_images)
                    squares, strength = self.squares.tried(teacher, triggers[[place]], label, pixels)
                    self.keep(state, squares, wanted[place].expand(len(strength)), strength, strength)
                    pool.filter(triggers[[place]], label, teacher)
        for label in findings.suspected.nonzero().flatten().tolist():
            triggers, strength = self.hunt(teacher, state, label, tell)
            self.keep(state, triggers, torch.full((len(strength),), label), strength, strength)
        bank.settle(teacher, pool.sample(self.bank_images)[0])

    def keep(
        self,
        state: SurveyState,
        triggers: Overlay,
        wanted: Tensor,
        strength: Tensor,
        untouched: Tensor,
        family: int = EXCERPTS,
    ) -> None:
        """Takes into the bank those triggers that stand out in the untouched model; where no class does, all of them.

        A pattern that leads there no further than those of other classes shows what the class looks like. A student that
        must ignore it unlearns the class with the backdoor.

        Args:
            state: Its bank is updated.
            triggers: The triggers, k of them.
            wanted: Their classes [k].
            strength: Their mean margins in the model that they were found in, in logits [k].
            untouched: The same in the untouched model [k].
            family: Index of the family that they are compared with.
        """
        findings = state.findings
        stand = findings.standing(untouched, family) > self.anomaly_threshold
        taken = stand if findings.backdoored else torch.ones_like(stand)
        state.bank.take(triggers[taken], wanted[taken], strength[taken])

    @torch.no_grad()
    def index(self, model: Classifier, search: Search, pool: ImagePool) -> tuple[Tensor, Tensor]:
        """The margin of each class in logits, and its anomaly in robust deviations, each [families, classes].

        The anomaly is the smaller of that of the margin and that of its gain over the margin without a trigger: classes that
        few images resemble start far behind, and others reach large margins because they start near.
        """
        margins = search.margins(model, pool.sample(self.judged_images)[0])
        gained = margins - baseline_margin(pool.answers)
        least = self.smallest_spread * pool.answers.std()
        anomaly = torch.minimum(anomalies(margins, least), anomalies(gained, least))
        if isinstance(model, Narrowed):  # the class that stands for all others
            anomaly[:, -1] = -torch.inf
        return margins, anomaly

    def outliers(self, anomaly: Tensor) -> Tensor:
        """Which classes stand out significantly in which families, bool [families, classes].

        A class that responds to a patch also responds to some whole-image patterns, which no student can ignore without
        losing that class. So whole-image families are restricted only where they stand out further than any local family
        and reach a share of the largest anomaly; then all of them are, as none reproduces the true trigger alone. Excerpts
        do not count in this comparison: a square of a faint pattern at full strength stands out as well. They are the most
        reliable local family, so if any excerpt stands out, only the classes whose excerpts do are kept: masks often accuse
        clean classes besides the true one.
        """
        outliers = anomaly > self.anomaly_threshold
        local, sought = (torch.tensor([getattr(kind, each) for kind in FAMILIES]) for each in ("local", "sought"))
        most, whole = anomaly[local & sought].amax(0), anomaly[~local].amax(0)
        clearly = (whole > most) & (whole > self.whole_image_share * anomaly.max())
        outliers[~local] = outliers[~local].any(0) & clearly
        if outliers[EXCERPTS].any():
            outliers[local] &= outliers[EXCERPTS].clone()
        return outliers

    @torch.enable_grad()
    def _refine(self, search: Search, model: Classifier, pool: ImagePool, sought: Tensor, tell: Tell) -> None:
        """Continues the search for the triggers marked in `sought`, bool [families, classes], on all images of a step.

        A faint trigger that is only half found is only half unlearned.
        """
        set_lr(search.optimizers, self.second_lr)
        total = self.second_rounds * int(sought.any(1).sum())
        done = 0
        for number, wanted in enumerate(sought.float()):
            for _ in range(self.second_rounds if wanted.any() else 0):
                done += 1
                tell("refining what stands out", done, total)
                pixels, _ = pool.sample(self.least_images)
                search.step(model, number, pixels, torch.multinomial(wanted, self.least_images, replacement=True))
        set_lr(search.optimizers, 1.0)


def seek(search: Search, model: Classifier, number: int, pixels: Tensor, suspected: Tensor | None = None) -> Tensor:
    """Takes one step for a family and returns the mean margin, a scalar.

    Args:
        search: The search.
        model: In eval mode.
        number: Index of the family.
        pixels: Images [n, c, h, w] in [0, 1].
        suspected: Classes that stand out, bool [classes]; three quarters of the images are led to them, the rest evenly to
            all classes.
    """
    wanted = (torch.arange(len(pixels)) + torch.randint(search.aims, ())) % search.aims
    if suspected is not None and suspected.any():
        drawn = torch.multinomial(suspected.float(), len(pixels), replacement=True)
        wanted = torch.where(torch.rand(len(pixels)) < 0.75, drawn, wanted)
    return search.step(model, number, pixels, wanted)


def excerpts_of(search: Search) -> Excerpts:
    """The family of excerpts in a search."""
    family = search.families[EXCERPTS]
    assert isinstance(family, Excerpts)
    return family
