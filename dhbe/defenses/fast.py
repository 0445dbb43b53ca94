"""The preset `fast`: the paper's idea in a hundredth of its iterations, on networks that are not only ResNets.

What differs from the paper, and why (docs/method.md tells more):

- Images are pieces of two photographs, and images that a generator makes familiar to the teacher's BatchNorm layers.
  None seeks disagreement: a generator that does finds the trigger by itself and teaches it back.
- Triggers are sought in the teacher before the student moves, one for each class, patches and masked and faint patterns.
  What leads a class far more than the others is a backdoor's work and is restricted with full weight; where nothing
  stands out the restriction is light, and a clean model stays what it is.
- All triggers found stay in a memory and are shown again as long as the student reacts to them.
- The student keeps the teacher's BatchNorm statistics and moves by small, bounded steps, so that it never has to relearn.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.defenses.album import Album
from dhbe.defenses.base import Eraser, Known, Ledger, Round, Scene
from dhbe.defenses.memory import Memory
from dhbe.defenses.parts import channels_last, descend, frozen_copy, gap, set_lr
from dhbe.defenses.photographs import pieces
from dhbe.defenses.search import NAMES, Masked, Search, anomalies, compact
from dhbe.defenses.statistics import BatchStatistics, imbalance, tracked
from dhbe.errors import Refused
from dhbe.generators import NOISE, PixelGenerator

PROBES = 64
"""Images on which the search in the teacher is concluded; later looks at the student take half of them."""

GROUPS = 8
"""Triggers in a batch; each is laid on its share of the triggered images."""

REFRESH = 5
"""Rounds between two looks at what the student still reacts to."""

AT_ONCE = 2**24
"""Values of the photographs' pieces that are drawn at a time."""

TURNS = ((1, 3), (2, 0))
"""Families that go on seeking in the student, in even and in odd rounds."""


@dataclass(frozen=True)
class FastDHBE(Eraser):
    """Restricted distillation on familiar images, against triggers that were sought before."""

    name: ClassVar[str] = "fast"

    warm_up: Annotated[int, "rounds before the student moves: images become familiar, triggers are sought"] = 60
    iterations: Annotated[int, "rounds: k student steps, then one step of each of two families of triggers"] = 40
    student_steps: Annotated[int, "student steps per round (k)"] = 5
    batch: Annotated[int, "images per step"] = 128
    alpha: Annotated[float, "weight of the restriction (eq. 8)"] = 1.0
    lr: Annotated[float, "peak learning rate of the student (SGD): up for a tenth of the rounds, then down to 0"] = 5e-3
    momentum: Annotated[float, "momentum of the student's SGD"] = 0.9
    weight_decay: Annotated[float, "weight decay of the student"] = 5e-4
    clip: Annotated[float, "largest norm of the student's gradient"] = 1.0
    lr_images: Annotated[float, "learning rate of the image generator (Adam)"] = 1e-3
    balance: Annotated[float, "weight of an even share of the classes among the generated images"] = 1.0
    album: Annotated[int, "images that the student is shown"] = 4096
    shown: Annotated[float, "share of the pixels that a masked trigger may show; a second family has half of it"] = (
        0.025
    )
    change: Annotated[float, "largest change of a pixel by a faint trigger"] = 16 / 255
    suspicion: Annotated[float, "robust standard deviations by which a backdoor's class stands out"] = 5.0
    triggered: Annotated[float, "share of triggered images in a student batch when a class stands out"] = 0.5
    light: Annotated[float, "the same when none does"] = 0.125

    @property
    def rounds(self) -> int:
        return self.warm_up + self.iterations

    def run(self, model: Classifier, known: Known, ledger: Ledger) -> Iterator[Round]:
        student, teacher = model.eval(), frozen_copy(model)
        channels, side, _ = model.shape
        images, familiar = PixelGenerator(side, channels), bool(tracked(teacher))
        search = Search(model.classes, model.shape, self.patch, self.shown, self.change)
        album = Album(self.album, model.shape, model.classes)
        memory = Memory(max(128, 4 * model.classes), model.shape, model.classes, len(search.families))
        channels_last(student, teacher, images)
        learn = SGD(student.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)
        imagine = Adam(images.parameters(), self.lr_images, fused=True)
        done = ledger.keep(
            student=student, images=images, families=nn.ModuleList(search.families), album=album, memory=memory,
            learn=learn, imagine=imagine, **{f"seek_{name}": optimizer for name, optimizer in zip(NAMES, search.optimizers, strict=True)},
        )  # fmt: skip
        if not done:
            some = max(1, AT_ONCE // math.prod(model.shape))
            for first in range(0, len(album), some):
                drawn = pieces(min(some, len(album) - first), model.shape)
                album.fill(drawn.to(model.mean.device), teacher, first)

        with BatchStatistics(teacher) as statistics:
            for _ in range(done, self.warm_up):
                losses: Round = {}
                if familiar:
                    with statistics.gathering():
                        answer = teacher(images(torch.randn(self.batch // 2, NOISE)))
                    losses["familiarity"] = statistics.distance()
                    descend(imagine, losses["familiarity"] + self.balance * imbalance(answer))
                for number in range(len(search.families)):
                    losses[f"lead_{NAMES[number]}"] = self.seek(search, teacher, number, album.sample(self.batch)[0])
                yield losses

        if done <= self.warm_up:  # nothing of it is in a ledger of the last round of the warm-up
            if familiar:
                album.renew(images, teacher)
            self.conclude(teacher, search, album, memory)
        share = self.triggered if memory.backdoored else self.light
        covered = min(max(1, round(share * self.batch)), self.batch - 1)

        for round_ in range(max(0, done - self.warm_up), self.iterations):
            set_lr([learn], self.rate(round_))
            if round_ % REFRESH == 0:
                self.remember(student, search, album, memory)

            for _ in range(self.student_steps):  # minimise over S: both kinds of image in one pass, no statistics move
                pixels, answer = album.sample(self.batch)
                with torch.no_grad():
                    groups = [memory.draw()(group) for group in pixels[:covered].tensor_split(GROUPS)]
                logits = student(torch.cat([*groups, pixels[covered:]]))
                restriction = gap(logits[:covered], answer[:covered])
                distillation = gap(logits[covered:], answer[covered:])
                learn.zero_grad()
                (2 * (1 - share) * distillation + 2 * share * self.alpha * restriction).backward()
                nn.utils.clip_grad_norm_(student.parameters(), self.clip)
                learn.step()

            losses = {"distillation": distillation, "restriction": restriction, "success": memory.success.amax()}
            for number in TURNS[round_ % 2]:  # maximise over R
                pixels, _ = album.sample(self.batch // 2)
                losses[f"lead_{NAMES[number]}"] = self.seek(search, student, number, pixels, memory.suspects)
            yield losses

    def seek(
        self, search: Search, model: Classifier, number: int, pixels: Tensor, suspects: Tensor | None = None
    ) -> Tensor:
        """One step of a family, over all classes evenly, or three quarters of it over those that stand out."""
        wanted = (torch.arange(len(pixels)) + torch.randint(search.classes, ())) % search.classes
        if suspects is not None and suspects.any():
            drawn = torch.multinomial(suspects.float(), len(pixels), replacement=True)
            wanted = torch.where(torch.rand(len(pixels)) < 0.75, drawn, wanted)
        return search.step(model, number, pixels, wanted)

    @torch.no_grad()
    def conclude(self, teacher: Classifier, search: Search, album: Album, memory: Memory) -> None:
        """What the search in the teacher came to: which classes stand out, and the triggers to begin with."""
        pixels, _ = album.sample(PROBES)
        leads = search.leads(teacher, pixels)
        anomaly = anomalies(leads, album.answers.std())
        memory.note(anomaly, leads.quantile(0.5, dim=1), anomaly > self.suspicion)
        for family, lead, sought in zip(search.families, leads, memory.sought, strict=True):
            wanted = sought.nonzero().flatten()
            forms = family.forms(wanted)
            memory.take(forms, wanted, lead[wanted])
            if memory.backdoored and isinstance(family, Masked):
                for place, label in enumerate(wanted.tolist()):
                    squares, strength = compact(teacher, forms[[place]], label, pixels[:8])
                    memory.take(squares, wanted[place].expand(len(strength)), strength)
                    album.sieve(forms[[place]], label, teacher)

    @torch.no_grad()
    def remember(self, student: Classifier, search: Search, album: Album, memory: Memory) -> None:
        """Takes in what the search found in the student, if it leads more than is natural, and retries all."""
        pixels, _ = album.sample(PROBES // 2)
        leads = search.leads(student, pixels)
        for family, lead, natural, sought in zip(search.families, leads, memory.natural, memory.sought, strict=True):
            wanted = (sought & (lead > natural)).nonzero().flatten()
            memory.take(family.forms(wanted), wanted, lead[wanted])
        memory.retry(student, pixels)

    def found(self, ledger: Ledger) -> dict[str, float]:
        """How far the class that stands out most does, against `suspicion`, and which it is."""
        anomaly = ledger.part("memory").anomaly.amax(0)
        return {"anomaly_index": float(anomaly.max()), "suspected_class": int(anomaly.argmax())}

    def check(self, shape: Shape) -> None:
        super().check(shape)
        if self.album < self.batch:
            raise Refused(f"--album {self.album}: it must hold one batch at least, {self.batch} images")

    def rate(self, iteration: int) -> float:
        """The share of the student's learning rate in force at this iteration."""
        done = iteration / self.iterations
        return max(0.0, min((iteration + 1) / max(1, round(0.1 * self.iterations)), (1 - done) / 0.9, 1.0))

    def draw_scene(self, model: Classifier, ledger: Ledger, count: int) -> Scene:
        pixels, _ = ledger.part("album").sample(count)
        memory: Memory = ledger.part("memory")
        strongest = memory.strength.argsort(descending=True)[: max(1, len(memory))]
        forms = memory.forms(strongest[torch.randint(len(strongest), (count,))])
        return Scene(pixels, forms(pixels), forms(torch.full_like(pixels, 0.5)))
