"""The preset `fast`: the paper's idea in a hundredth of its iterations, on networks that are not only ResNets.

What differs from the paper, and why (docs/method.md has the figures):

- Images are valid pixels, and first of all familiar to the teacher: their statistics at its BatchNorm layers are those
  it remembers. A generator that seeks disagreement needs thousands of rounds to come near to what real images look like.
- Images are kept in an album with the teacher's answers and used again: a student step costs two passes, not four.
- The student keeps the teacher's BatchNorm statistics and moves by small steps, so that it never has to relearn.
- Triggers replace the pixels they cover, as real ones do, each image at its own place. Beside the paper's generator,
  which seeks any reaction, one set of patches for each class seeks that class.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.defenses.base import Eraser, Known, Ledger, Round, Scene
from dhbe.defenses.parts import channels_last, descend, frozen, frozen_copy, gap, lay, set_lr
from dhbe.defenses.statistics import BatchStatistics, imbalance
from dhbe.errors import Refused
from dhbe.generators import NOISE, PixelGenerator, TriggerGenerator


@dataclass(frozen=True)
class FastDHBE(Eraser):
    """Restricted distillation on familiar images."""

    name: ClassVar[str] = "fast"

    warm_up: Annotated[int, "rounds of the generators alone, before the student moves"] = 80
    iterations: Annotated[int, "rounds: k student steps, one step of the images and one of the triggers"] = 90
    student_steps: Annotated[int, "student steps per round (k)"] = 5
    batch: Annotated[int, "images per step"] = 64
    alpha: Annotated[float, "weight of the restriction (eq. 8)"] = 1.0
    lr: Annotated[float, "peak learning rate of the student (SGD): up for a tenth of the rounds, then down to 0"] = 5e-3
    momentum: Annotated[float, "momentum of the student's SGD"] = 0.9
    weight_decay: Annotated[float, "weight decay of the student"] = 5e-4
    lr_images: Annotated[float, "learning rate of the image generator (Adam)"] = 1e-3
    lr_triggers: Annotated[float, "learning rate of the trigger generator (Adam)"] = 1e-2
    lr_patches: Annotated[float, "learning rate of the patches that seek a class (Adam)"] = 0.1
    balance: Annotated[float, "weight of an even share of the classes among the images"] = 1.0
    album: Annotated[int, "images that are kept and used again"] = 2048

    @property
    def rounds(self) -> int:
        return self.warm_up + self.iterations

    def run(self, model: Classifier, known: Known, ledger: Ledger) -> Iterator[Round]:
        student, teacher = model.eval(), frozen_copy(model)
        channels, side, _ = model.shape
        images, triggers = PixelGenerator(side, channels), TriggerGenerator(self.patch, channels)
        seekers, album = Seekers(model.classes, self.patch, channels), Album(self.album, model.shape, model.classes)
        channels_last(student, teacher, images)
        learn = SGD(student.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)
        imagine = Adam(images.parameters(), self.lr_images, fused=True)
        attack = Adam(triggers.parameters(), self.lr_triggers, fused=True)
        seek = Adam(seekers.parameters(), self.lr_patches, fused=True)
        done = ledger.keep(
            student=student, images=images, triggers=triggers, seekers=seekers, album=album,
            learn=learn, imagine=imagine, attack=attack, seek=seek,
        )  # fmt: skip

        def stamp(pixels: Tensor) -> Tensor:
            """Half of the images with patches that seek a class, half with generated ones."""
            half = len(pixels) // 2
            patches = [seekers(torch.randint(model.classes, (half,))), triggers(torch.randn(len(pixels) - half, NOISE))]
            return paste(pixels, torch.cat(patches))

        with BatchStatistics(teacher) as statistics:
            for round in range(done, self.rounds):
                warm = round < self.warm_up
                losses: Round = {}
                set_lr([learn], self.rate(round - self.warm_up))

                for _ in range(0 if warm else self.student_steps):  # minimise over S
                    pixels, answer = album.sample(self.batch)
                    with torch.no_grad():
                        triggered = stamp(pixels)
                    clean = student(pixels)
                    losses["distillation"] = gap(clean, answer)
                    losses["restriction"] = gap(student(triggered), clean.detach())
                    descend(learn, losses["distillation"] + self.alpha * losses["restriction"])

                with frozen(student):
                    pixels = images(torch.randn(self.batch, NOISE))  # familiar images
                    with statistics.gathering():
                        answer = teacher(pixels)
                    losses["familiarity"] = statistics.distance()
                    descend(imagine, losses["familiarity"] + self.balance * imbalance(answer))
                    album.add(pixels, answer)

                    pixels, _ = album.sample(self.batch)  # maximise over R
                    with torch.no_grad():
                        clean = student(pixels)
                    losses["reaction"] = gap(student(paste(pixels, triggers(torch.randn(self.batch, NOISE)))), clean)
                    descend(attack, -losses["reaction"])

                    wanted = torch.arange(self.batch) % model.classes
                    losses["margin"] = margin(student(paste(pixels, seekers(wanted))), wanted).mean()
                    descend(seek, -losses["margin"])

                yield losses

    def check(self, shape: Shape) -> None:
        super().check(shape)
        if self.album < self.batch:
            raise Refused(f"--album {self.album}: it must hold one batch at least, {self.batch} images")

    def rate(self, iteration: int) -> float:
        """The share of the student's learning rate in force at this iteration."""
        done = iteration / self.iterations
        return max(0.0, min((iteration + 1) / max(1, round(0.1 * self.iterations)), (1 - done) / 0.9, 1.0))

    def draw_scene(self, model: Classifier, ledger: Ledger, count: int) -> Scene:
        pixels = ledger.part("images")(torch.randn(count, NOISE))
        half = count // 2
        patches = [
            ledger.part("seekers")(torch.arange(half) % model.classes),
            ledger.part("triggers")(torch.randn(count - half, NOISE)),
        ]
        mixed = torch.cat(patches)[torch.randperm(count)]
        return Scene(pixels, paste(pixels, mixed), (mixed + 1) / 2)


class Seekers(nn.Module):
    """One patch for each class, which seeks that class; values in (-1, 1) as the trigger generator's."""

    def __init__(self, classes: int, side: int, channels: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(0.5 * torch.randn(classes, channels, side, side))

    def forward(self, wanted: Tensor) -> Tensor:
        """Patches [n, c, p, p] of classes [n]."""
        return self.raw.tanh()[wanted]


class Album(nn.Module):
    """The latest images with the teacher's answers, in 8 bits as a camera would deliver them."""

    pixels: Tensor
    answers: Tensor
    added: Tensor

    def __init__(self, size: int, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.register_buffer("pixels", torch.zeros(size, *shape, dtype=torch.uint8))
        self.register_buffer("answers", torch.zeros(size, classes))
        self.register_buffer("added", torch.zeros((), dtype=torch.int64))

    def add(self, pixels: Tensor, answers: Tensor) -> None:
        """Takes images in, in place of the oldest."""
        place = (self.added + torch.arange(len(pixels))) % len(self.pixels)
        self.pixels[place] = (pixels.detach() * 255).round().to(torch.uint8)
        self.answers[place] = answers.detach()
        self.added += len(pixels)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Images [n, c, h, w] in [0, 1] and answers [n, classes], with repetition."""
        filled = self.added.clamp(max=len(self.pixels))
        place = (torch.rand(count) * filled).long()
        pixels = self.pixels[place].float() / 255
        return pixels.contiguous(memory_format=torch.channels_last), self.answers[place]


def paste(pixels: Tensor, patches: Tensor) -> Tensor:
    """Images [n, c, h, w] in [0, 1] with patches [n, c, p, p] in (-1, 1) in place of what they cover, anywhere."""
    height, width = pixels.shape[-2:]
    cover = torch.ones_like(patches[:, :1])
    laid = lay(torch.cat([(patches + 1) / 2, cover], dim=1), height, width, each=True)
    patch, mask = laid[:, :-1], laid[:, -1:]
    return pixels * (1 - mask) + patch


def margin(logits: Tensor, wanted: Tensor) -> Tensor:
    """How far the wanted class leads before the best other one, [n]; up to `ENOUGH`, more is not sought."""
    own = logits.gather(1, wanted[:, None]).squeeze(1)
    others = logits.scatter(1, wanted[:, None], -torch.inf).amax(1)
    return (own - others).clamp(max=ENOUGH)


ENOUGH = 5.0
"""Logits; a patch that leads by so much needs no more strength."""
