"""DeepInversion: synthesises images from the model's BatchNorm statistics, and distils a student on them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from dhbe.classifier import Classifier
from dhbe.defenses.base import Defense, Known
from dhbe.run_state import RunState
from dhbe.search.batchnorm import BatchStatistics
from dhbe.settings import Setting
from dhbe.steps import Round, descend, frozen_copy, gap, set_lr, stepped, variation

SMOOTH = 1e-3
"""Weight of the images' variation."""

FAMILIAR = 10.0
"""Weight of the distance from the BatchNorm statistics."""

JITTER = 2
"""Maximum random shift of the images during their optimisation, in pixels."""


@dataclass(frozen=True)
class DeepInversion(Defense):
    """Distillation on inverted images (Yin et al., CVPR 2020, arXiv:1912.08795), for section 5.4.4 of the DHBE paper.

    Loss weights and learning rate are those of their CIFAR-10 settings. The distance from the BatchNorm statistics is a
    mean over layers in units of each channel's deviation, not a sum of norms. The student starts as a copy and imitates
    the logits, as in DFAD, so that only the images differ.
    """

    name: ClassVar[str] = "inversion"
    needs: ClassVar[frozenset] = frozenset()

    batches: Annotated[int, Setting("batches of inverted images", least=1)] = 8
    batch: Annotated[int, Setting("images in each of these batches, and per step of the distillation", least=4)] = 128
    steps: Annotated[int, Setting("optimisation steps for each of these batches", least=1)] = 2000
    lr_images: Annotated[float, Setting("learning rate of the images (Adam)")] = 0.1
    epochs: Annotated[int, Setting("epochs of the distillation", least=1)] = 100
    lr: Annotated[float, Setting("learning rate of the student (SGD), x0.1 at 60 % and 80 % of the epochs")] = 0.1
    momentum: Annotated[float, Setting("momentum of the student's SGD")] = 0.9
    weight_decay: Annotated[float, Setting("weight decay of the student")] = 5e-4

    @property
    def rounds(self) -> int:
        return self.batches * self.steps + self.epochs

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        teacher = frozen_copy(model)
        inverted = nn.ParameterList(start(model, self.batch) for _ in range(self.batches))
        imagine = Adam(inverted.parameters(), self.lr_images)  # skips batches without a gradient
        learn = SGD(model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)
        run_state.register(student=model, inverted=inverted, imagine=imagine, learn=learn)
        done = run_state.restore()
        sought = self.batches * self.steps
        with BatchStatistics(teacher) as statistics:
            for step in range(done, sought):
                yield invert(teacher, statistics, inverted[step // self.steps], imagine)
        with torch.no_grad():
            images = torch.cat(list(inverted))
            answers = torch.cat([teacher(batch) for batch in inverted])
        for epoch in range(max(0, done - sought), self.epochs):
            set_lr([learn], stepped(epoch / self.epochs))
            for index in torch.randperm(len(images)).split(self.batch):
                distillation = gap(model(images[index]), answers[index])
                descend(learn, distillation)
            yield {"distillation": distillation}


def start(model: Classifier, count: int) -> Tensor:
    """Initial noise: pixels [n, c, h, w] in [0, 1]."""
    return (0.5 + 0.25 * torch.randn(count, *model.shape)).clamp(0, 1)


def invert(teacher: Classifier, statistics: BatchStatistics, pixels: nn.Parameter, imagine: Adam) -> Round:
    """Takes one optimisation step on a batch of images (eq. 1 to 5); image i is to show class i mod classes.

    Args:
        teacher: Frozen, in eval mode.
        statistics: Open on the teacher.
        pixels: The images [n, c, h, w] in [0, 1]; changed in place.
        imagine: Their optimiser.

    Returns:
        The losses, scalars by name.
    """
    labels = torch.arange(len(pixels)) % teacher.classes
    shift = torch.randint(-JITTER, JITTER + 1, (2,)).tolist()
    moved = teacher.normalise(pixels.roll(shift, dims=(2, 3)))
    with statistics.gathering():
        loss = F.cross_entropy(teacher.logits(moved), labels)
    bn_loss = statistics.distance()
    descend(imagine, loss + FAMILIAR * bn_loss + SMOOTH * variation(moved))
    with torch.no_grad():
        pixels.clamp_(0, 1)
    return {"loss": loss, "bn_loss": bn_loss}
