"""DHBE: data-free holistic backdoor erasing (Yan et al., AsiaCCS 2023, arXiv:2306.08009).

A student starts as a copy of the suspect teacher. One generator draws images on which the two disagree, and the student
learns to agree (distillation); another draws small patches to which the student reacts, and the student learns to
ignore them (restriction). No image of the real world is ever seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from dhbe.classifier import Classifier
from dhbe.defenses.base import Defense, Known, Ledger, Round
from dhbe.defenses.statistics import BatchStatistics, corrected
from dhbe.generators import NOISE, ImageGenerator, TriggerGenerator


@dataclass(frozen=True)
class DHBE(Defense):
    """Restricted adversarial distillation (section 4, algorithm 1). The defaults are the preset `fast`."""

    name: ClassVar[str] = "dhbe"
    needs: ClassVar[frozenset] = frozenset()

    iterations: Annotated[int, "rounds; one is k student steps, one of the image and one of the trigger generator"] = 120
    student_steps: Annotated[int, "student steps per round (k)"] = 5
    batch: Annotated[int, "generated images per step"] = 128
    alpha: Annotated[float, "weight of the restriction (eq. 8)"] = 0.5
    lr: Annotated[float, "peak learning rate of the student (SGD)"] = 0.1
    momentum: Annotated[float, "momentum of the student's SGD"] = 0.9
    weight_decay: Annotated[float, "weight decay of the student"] = 5e-4
    lr_generators: Annotated[float, "learning rate of both generators (Adam)"] = 1e-3
    schedule: Annotated[Literal["steps", "linear"], "x0.1 at 60 % and 80 %, or up for 10 % and down to 0"] = "linear"
    patch: Annotated[int, "side of the generated triggers in pixels (p)"] = 5
    scale: Annotated[float, "greatest change of a pixel by a generated trigger (s)"] = 1.0
    places: Annotated[Literal["batch", "sample"], "one random place for the whole batch, or one per image"] = "sample"
    smooth: Annotated[float, "weight of the smoothness prior on generated images"] = 0.0
    detach_clean: Annotated[bool, "no gradient through the clean branch of the restriction"] = True
    dropout: Annotated[bool, "dropout of the student is on, as in training"] = False
    warm_up: Annotated[int, "steps that fit the image generator to the teacher's BatchNorm statistics first"] = 60
    statistics: Annotated[float, "weight of the BatchNorm statistics in the image generator's loss"] = 1.0
    correct: Annotated[int, "batches that re-estimate the student's BatchNorm statistics at the end"] = 20

    @property
    def rounds(self) -> int:
        return self.warm_up + self.iterations

    def run(self, model: Classifier, known: Known, ledger: Ledger) -> Iterator[Round]:
        student, teacher = model, frozen_copy(model)
        channels, height, width = model.shape
        images, triggers = ImageGenerator(max(height, width), channels), TriggerGenerator(self.patch, channels)
        for network in (student, teacher, images):
            network.to(memory_format=torch.channels_last)
        if not self.dropout:
            hold_dropout(student)
        learn = SGD(student.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)
        imagine = Adam(images.parameters(), self.lr_generators, fused=True)
        attack = Adam(triggers.parameters(), self.lr_generators, fused=True)
        done = ledger.keep(
            student=student, images=images, triggers=triggers, learn=learn, imagine=imagine, attack=attack
        )

        def draw() -> Tensor:
            """Fresh images, in pixels."""
            return model.denormalise(images(torch.randn(self.batch, NOISE)))

        def stamp(pixels: Tensor) -> Tensor:
            """The pixels with fresh triggers laid on them (section 4.3.3); the sum is not clipped."""
            patches = self.scale * triggers(torch.randn(self.batch, NOISE))
            return pixels + lay(patches, height, width, each=self.places == "sample")

        with BatchStatistics(teacher) as statistics:

            def imagine_step(weight: float) -> Tensor:
                """The image generator seeks disagreement, among images the teacher finds familiar."""
                pixels = draw()
                with statistics.gathering():
                    answer = teacher(pixels)
                disagreement = gap(student(pixels), answer) if weight else torch.zeros(())
                prior = self.smooth * variation(model.normalise(pixels)) if self.smooth else 0.0
                descend(imagine, self.statistics * statistics.distance() + prior - weight * disagreement)
                return disagreement

            for _ in range(done, self.warm_up):
                with frozen(student):
                    imagine_step(weight=0.0)
                yield {"familiarity": statistics.distance().detach()}

            for iteration in range(max(done - self.warm_up, 0), self.iterations):
                set_lr((learn, imagine, attack), self.rate(iteration))

                for _ in range(self.student_steps):  # minimise over S
                    with torch.no_grad():
                        pixels = draw()
                        stamped, answer = stamp(pixels), teacher(pixels)
                    clean = student(pixels)
                    distillation = gap(clean, answer)
                    restriction = gap(student(stamped), clean.detach() if self.detach_clean else clean)
                    descend(learn, distillation + self.alpha * restriction)

                with frozen(student):
                    disagreement = imagine_step(weight=1.0)  # maximise over G

                    with torch.no_grad():  # maximise over R
                        pixels = draw()
                        clean = student(pixels)
                    reaction = gap(student(stamp(pixels)), clean)
                    descend(attack, -reaction)

                yield {
                    "distillation": distillation.detach(),
                    "restriction": restriction.detach(),
                    "disagreement": disagreement.detach(),
                    "reaction": reaction.detach(),
                }

        if self.correct:
            corrected(student, teacher, draw, self.correct)

    def rate(self, iteration: int) -> float:
        """The share of the learning rates in force at this iteration."""
        done = iteration / self.iterations
        if self.schedule == "steps":
            return 1.0 if done < 0.6 else 0.1 if done < 0.8 else 0.01
        return min((iteration + 1) / max(1, round(0.1 * self.iterations)), (1 - done) / 0.9, 1.0)


PRESETS = {
    "fast": DHBE(),
    "paper": DHBE(
        iterations=300 * 50, student_steps=3, batch=128, alpha=0.1, schedule="steps", places="batch", smooth=0.0,
        detach_clean=False, dropout=True, warm_up=0, statistics=0.0, correct=0,
    ),
    "official": DHBE(
        iterations=300 * 50, student_steps=5, batch=256, alpha=0.1, schedule="steps", places="batch", smooth=1e-4,
        detach_clean=True, dropout=True, warm_up=0, statistics=0.0, correct=0,
    ),
}  # fmt: skip
"""`paper` follows the text, `official` the authors' released script; docs/method.md lists where they differ."""


def gap(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference over batch and classes (eq. 2 and eq. 7)."""
    return F.l1_loss(a, b)


def variation(images: Tensor) -> Tensor:
    """Sum over the four neighbour directions of the L2 norm of the whole batch's differences (not averaged).

    Args:
        images: Normalised images [n, c, h, w].
    """
    across, down = images[..., :, 1:] - images[..., :, :-1], images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    return across.norm() + down.norm() + falling.norm() + rising.norm()


def lay(patches: Tensor, height: int, width: int, *, each: bool) -> Tensor:
    """Patches [n, c, p, p] at random places of empty images [n, c, height, width]; zeros elsewhere.

    Each patch has its own place or, as in the paper, all of a batch share one. Rows and columns are set by two
    products with 0/1 matrices: shapes stay fixed, and nothing waits for the device.
    """
    count, side = patches.shape[0] if each else 1, patches.shape[-1]
    offsets = torch.arange(side).view(1, side, 1)

    def rails(length: int) -> Tensor:
        first = torch.randint(length - side + 1, (count, 1, 1))
        return (torch.arange(length).view(1, 1, length) == first + offsets).to(patches.dtype)

    rows, columns = rails(height), rails(width)
    return rows.transpose(1, 2).unsqueeze(1) @ patches @ columns.unsqueeze(1)


def descend(optimizer: Optimizer, loss: Tensor) -> None:
    """One step down the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def set_lr(optimizers: tuple[Optimizer, ...], share: float) -> None:
    """Sets the learning rates to a share of what they began with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])


def frozen_copy(model: Classifier) -> Classifier:
    """A copy in eval mode that takes no gradients."""
    import copy

    return copy.deepcopy(model).eval().requires_grad_(False)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the weights inside: what is not used is not computed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def hold_dropout(model: nn.Module) -> None:
    """Switches dropout off, and only dropout."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
