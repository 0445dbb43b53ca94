"""What the defences that hold some clean images share: the few-data protocol of the paper (section 5.1.3, app. C)."""

from abc import ABC
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from dhbe.classifier import Classifier, evaluating
from dhbe.data import Images
from dhbe.defenses.base import Defense, Known
from dhbe.errors import Refused
from dhbe.settings import Setting
from dhbe.steps import descend, set_lr
from dhbe.training import crop_and_flip


@dataclass(frozen=True)
class Tuner(Defense, ABC):
    """A defence that trains on clean images: SGD, x0.1 after a half and after three quarters of the epochs."""

    needs: ClassVar[frozenset] = frozenset({"clean images"})

    epochs: Annotated[int, Setting("passes of the finetuning", least=1)] = 20
    size: Annotated[int, Setting("images a pass; fewer are used again, of more each pass takes others", least=1)] = 2000
    batch: Annotated[int, Setting("images a step", least=4)] = 64
    lr: Annotated[float, Setting("learning rate (SGD), x0.1 after a half and after three quarters of the passes")] = (
        0.01
    )
    momentum: Annotated[float, Setting("momentum of SGD")] = 0.9
    crop: Annotated[int, Setting("zeros padded to each side before a random crop back to size, in pixels")] = 4
    flip: Annotated[bool, Setting("mirror half of the images left to right")] = True

    def lent(self, model: Classifier, known: Known) -> Images:
        """The clean images, on the model's device.

        Raises:
            Refused: They do not fit the model, or are too few to train on.
        """
        clean = known.clean
        assert clean is not None  # the base has looked
        if clean.shape != model.shape or (len(clean) and int(clean.labels.max()) >= model.classes):
            raise Refused(
                f"the clean images are {clean.shape} of {clean.classes} classes, "
                f"the model takes {model.shape} of {model.classes}"
            )
        if len(clean) < 8:
            raise Refused(f"{self.name} needs more than {len(clean)} clean images: 8 at the very least")
        return clean.to(model.mean.device)

    def optimizer(self, parameters: Iterator[nn.Parameter]) -> Optimizer:
        """Of the protocol; it knows no weight decay."""
        return SGD(parameters, self.lr, self.momentum, fused=True)

    def decay(self, epoch: int, epochs: int | None = None) -> float:
        """The share of the learning rate in force in this epoch."""
        done = epoch / (epochs or self.epochs)
        return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01

    def batches(self, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
        """Cropped and mirrored pixels in [0, 1] and labels: one pass. An incomplete last batch is left out."""
        passes = -(-self.size // len(images))
        order = torch.cat([torch.randperm(len(images)) for _ in range(passes)])[: self.size]
        for index in order.split(self.batch)[: max(1, len(order) // self.batch)]:
            offsets = torch.randint(2 * self.crop + 1, (2, len(index)))
            flip = torch.rand(len(index)) < (0.5 if self.flip else 0.0)
            yield crop_and_flip(images.pixels[index], self.crop, offsets, flip).float() / 255, images.labels[index]

    def tune(
        self,
        model: Classifier,
        learn: Optimizer,
        images: Images,
        epoch: int,
        epochs: int | None = None,
        stamp: Callable[[Tensor], Tensor] = lambda pixels: pixels,
    ) -> Tensor:
        """One pass with cross-entropy; the mean loss. `stamp` may change the pixels, and the labels stay true."""
        set_lr([learn], self.decay(epoch, epochs))
        total, steps = torch.zeros(()), 0
        for pixels, labels in self.batches(images):
            loss = F.cross_entropy(model(stamp(pixels)), labels)
            descend(learn, loss)
            total, steps = total + loss.detach(), steps + 1
        return total / steps


def hold_out(images: Images, share: float) -> tuple[Images, Images]:
    """Random images to train on, and the share that is held out to judge by; at least one of each."""
    order = torch.randperm(len(images), device=images.pixels.device)
    held = min(max(1, round(share * len(images))), len(images) - 1)
    return images.subset(order[held:]), images.subset(order[:held])


def accuracy_on(model: Classifier, images: Images, batch: int = 512) -> float:
    """The share of images classified right, in eval mode."""
    with evaluating(model), torch.no_grad():
        hits = [(model(pixels).argmax(1) == labels).sum() for pixels, labels in images.batches(batch)]
    return int(torch.stack(hits).sum()) / len(images)
