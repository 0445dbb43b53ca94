"""What can be learned of a classifier without data, before anything moves: familiar images, and the triggers it answers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint

from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.defenses.base import Eraser
from dhbe.errors import Refused
from dhbe.generators import NOISE, PixelGenerator
from dhbe.run_state import RunState, Stateful
from dhbe.search.batchnorm import BatchStatistics, imbalance, tracked
from dhbe.search.families import LOCAL, NAMES, Masked
from dhbe.search.image_pool import ImagePool
from dhbe.search.photographs import pieces
from dhbe.search.search import Search, anomalies, compact, lead
from dhbe.search.trigger_bank import TriggerBank
from dhbe.steps import Round, channels_last, descend, set_lr

JUDGED = 256
"""Images on which it is judged how far classes stand out; with a quarter of them chance alone moves that by one."""

EACH = 6
"""Images for each class in a step of the search."""

FEWEST = 64
"""Images in a step of the search, however few the classes, and in one pass, however small the batch."""

UNSURE = (2.5, 10.0)
"""Between these, in robust standard deviations, a class may stand out by chance, and the search takes a second look."""

TRIED = 4
"""Images on which squares are tried."""

TRIED_AGAIN = 16
"""Images on which all that is remembered is tried in the end."""

SECOND, MORE, SLOWER = 20, 3, 0.3
"""Rounds of the second look, how many times as many images it takes a step, and the share of the learning rates."""

AT_ONCE = 2**20
"""Values of the photographs' pieces that are drawn at a time."""


class SurveyState:
    """All that a survey writes down."""

    def __init__(self, survey: "Survey", model: Classifier) -> None:
        channels, side, _ = model.shape
        self.images = PixelGenerator(side, channels)
        self.imagine = Adam(self.images.parameters(), survey.lr_images, fused=True)
        self.search = survey.searching(model)
        self.album = ImagePool(survey.album, model.shape, model.classes)
        self.memory = TriggerBank(max(128, 4 * model.classes), model.shape, model.classes, len(self.search.families))
        self.memory.surveyed += survey.warm_up
        channels_last(self.images)

    def parts(self) -> dict[str, Stateful]:
        """Everything that changes, by name."""
        seekers = {f"seek_{name}": optimizer for name, optimizer in zip(NAMES, self.search.optimizers, strict=True)}
        return {
            "images": self.images, "imagine": self.imagine, "families": nn.ModuleList(self.search.families),
            "album": self.album, "memory": self.memory, **seekers,
        }  # fmt: skip

    def close(self, run_state: RunState) -> None:
        """Lets go of the generator, which has done its work when the album holds its images."""
        run_state.drop("images", "imagine")
        del self.images, self.imagine


@dataclass(frozen=True)
class Survey(Eraser):
    """Hyperparameters of the search in an untouched model, and the search."""

    warm_up: Annotated[int, "rounds before the student moves: images become familiar, triggers are sought"] = 60
    lr_images: Annotated[float, "learning rate of the image generator (Adam)"] = 1e-3
    balance: Annotated[float, "weight of an even share of the classes among the generated images"] = 1.0
    album: Annotated[int, "images that the student is shown"] = 4096
    shown: Annotated[float, "share of the pixels that a masked trigger may show; a second family has half of it"] = (
        0.025
    )
    change: Annotated[float, "largest change of a pixel by a faint trigger"] = 16 / 255
    wave: Annotated[float, "largest height of one wave over the whole image"] = 28 / 255
    anomaly_threshold: Annotated[float, "robust standard deviations by which a backdoor's class stands out"] = 3.6
    batch: Annotated[int, "images in a step of the student and in one pass of the search"] = 128

    @property
    def longest(self) -> int:
        """Rounds that the search in an untouched model takes at the most."""
        return self.warm_up + SECOND

    def searching(self, model: Classifier, *, away: bool = False) -> Search:
        """A fresh search, for each class; with `away`, for any but the usual too."""
        settings = (self.patch, self.shown, self.change, self.wave)
        return Search(model.classes, model.shape, *settings, at_once=max(self.batch, FEWEST), away=away)

    def check(self, shape: Shape) -> None:
        super().check(shape)
        if self.album < self.batch:
            raise Refused(f"--album {self.album}: it must hold one batch at least, {self.batch} images")

    def survey(self, teacher: Classifier, notes: SurveyState, done: int = 0) -> Iterator[Round]:
        """Makes images familiar and seeks triggers, from round `done` on; `conclude` tells what it came to.

        Args:
            teacher: In eval mode, without gradients.
            notes: Where all is written down.
            done: Rounds that the notes hold.
        """
        album, search = notes.album, notes.search
        if not done:
            some = max(1, AT_ONCE // math.prod(teacher.shape))
            for first in range(0, len(album), some):
                drawn = pieces(min(some, len(album) - first), teacher.shape)
                album.fill(drawn.to(teacher.mean.device), teacher, first)
        familiar = bool(tracked(teacher))
        with BatchStatistics(teacher) as statistics:
            for _ in range(done, self.warm_up):
                losses: Round = {}
                if familiar:
                    with statistics.gathering():
                        # The generator's activations are computed again when needed: beside the teacher's they were the
                        # peak of a whole run.
                        noise = torch.randn(FEWEST, NOISE)
                        drawn = checkpoint(notes.images, noise, use_reentrant=False, preserve_rng_state=False)
                        answer = teacher(drawn)
                    losses["familiarity"] = statistics.distance()
                    descend(notes.imagine, losses["familiarity"] + self.balance * imbalance(answer))
                yield {**losses, **step(search, teacher, album)}
        if done <= self.warm_up and UNSURE[0] < index(teacher, search, album)[1].max() < UNSURE[1]:
            notes.memory.surveyed += SECOND
            set_lr(search.optimizers, SLOWER)
        for _ in range(max(done, self.warm_up), int(notes.memory.surveyed)):
            yield step(search, teacher, album, MORE)
        set_lr(search.optimizers, 1.0)
        if familiar:
            album.renew(notes.images, teacher)

    def explore(self, model: Classifier, notes: SurveyState, watch: Callable[[Round], None]) -> Search:
        """A fresh search of as many rounds on the images at hand, for each class and for any but the usual.

        Args:
            model: In eval mode, without gradients.
            notes: Of a survey; only their images are used.
            watch: Called after every round.
        """
        search = self.searching(model, away=True)
        for _ in range(self.warm_up):
            watch(step(search, model, notes.album))
        return search

    @torch.no_grad()
    def conclude(self, teacher: Classifier, notes: SurveyState) -> None:
        """What the search came to: which classes stand out, and the triggers to begin with."""
        album, memory = notes.album, notes.memory
        leads, anomaly = index(teacher, notes.search, album)
        outliers, local, whole = anomaly > self.anomaly_threshold, anomaly[:LOCAL].amax(0), anomaly[LOCAL:].amax(0)
        outliers[LOCAL:] = outliers[LOCAL:].any(0) & (whole > local) & (whole > anomaly.max() / 3)
        memory.note(leads, anomaly, outliers)
        if memory.backdoored:
            refine(notes.search, teacher, album, memory.sought)
        for family, reached, sought in zip(notes.search.families, leads, memory.sought, strict=True):
            wanted = sought.nonzero().flatten()
            forms = family.forms(wanted)
            memory.take(forms, wanted, reached[wanted])
            if memory.backdoored and isinstance(family, Masked):
                for place, label in enumerate(wanted.tolist()):
                    squares, strength = compact(teacher, forms[[place]], label, album.sample(TRIED)[0])
                    memory.take(squares, wanted[place].expand(len(strength)), strength)
                    album.filter(forms[[place]], label, teacher)
        memory.settle(teacher, album.sample(TRIED_AGAIN)[0])


@torch.enable_grad()
def refine(search: Search, model: Classifier, album: ImagePool, sought: Tensor) -> None:
    """Seeks triggers of some families and classes [families, classes] further: all images of a step are for them.

    A faint trigger that is found by half is unlearned by half.
    """
    set_lr(search.optimizers, SLOWER)
    for number, wanted in enumerate(sought.float()):
        for _ in range(SECOND if wanted.any() else 0):
            pixels, _ = album.sample(FEWEST)
            search.step(model, number, pixels, torch.multinomial(wanted, FEWEST, replacement=True))
    set_lr(search.optimizers, 1.0)


def step(search: Search, model: Classifier, album: ImagePool, more: int = 1) -> Round:
    """One step of each family, on `more` times as many images as usual."""
    count = more * max(FEWEST, EACH * model.classes)
    return {f"lead_{name}": seek(search, model, number, album.sample(count)[0]) for number, name in enumerate(NAMES)}


def seek(search: Search, model: Classifier, number: int, pixels: Tensor, suspects: Tensor | None = None) -> Tensor:
    """One step of a family, over all classes evenly, or three quarters of it over those that stand out."""
    wanted = (torch.arange(len(pixels)) + torch.randint(search.aims, ())) % search.aims
    if suspects is not None and suspects.any():
        drawn = torch.multinomial(suspects.float(), len(pixels), replacement=True)
        wanted = torch.where(torch.rand(len(pixels)) < 0.75, drawn, wanted)
    return search.step(model, number, pixels, wanted)


@torch.no_grad()
def index(model: Classifier, search: Search, album: ImagePool) -> tuple[Tensor, Tensor]:
    """How far each class leads, and by how many robust deviations it stands out [families, classes].

    A class that stands out must do so both by its lead and by what the trigger adds to its lead without one: classes
    that hardly any image is like are far behind to begin with, and others gain much because they are near.
    """
    pixels, _ = album.sample(JUDGED)
    leads = search.leads(model, pixels)[:, : model.classes]
    spread = album.answers.std()
    return leads, torch.minimum(anomalies(leads, spread), anomalies(leads - baseline_margin(album.answers), spread))


def baseline_margin(answers: Tensor) -> Tensor:
    """Mean lead of each class [classes] without a trigger, over images [n, classes] that are taken for another one."""
    rows = []
    for label in range(answers.shape[1]):
        others = answers[answers.argmax(1) != label]
        rows.append(lead(others, torch.full((len(others),), label)).mean() if len(others) else torch.zeros(()))
    return torch.stack(rows)
