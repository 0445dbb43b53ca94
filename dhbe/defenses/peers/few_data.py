"""The few-data protocol of the paper (section 5.1.3, app. C), shared by the defences that need clean images."""

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
    """A defence that trains on clean images: SGD, x0.1 after half and after three quarters of the epochs."""

    needs: ClassVar[frozenset] = frozenset({"clean images"})

    epochs: Annotated[int, Setting("epochs of finetuning", least=1)] = 20
    size: Annotated[
        int, Setting("images per epoch; fewer are repeated, more are subsampled anew in each epoch", least=1)
    ] = 2000
    batch: Annotated[int, Setting("images per step", least=4)] = 64
    lr: Annotated[float, Setting("learning rate (SGD), x0.1 after half and after three quarters of the epochs")] = 0.01
    momentum: Annotated[float, Setting("momentum of SGD")] = 0.9
    crop: Annotated[int, Setting("pixels of zero padding on each side before a random crop back to size")] = 4
    flip: Annotated[bool, Setting("flip half of the images horizontally")] = True

    def lent(self, model: Classifier, known: Known) -> Images:
        """The clean images, on the model's device.

        Raises:
            Refused: They do not fit the model, or there are fewer than 8.
        """
        clean = known.clean
        assert clean is not None  # checked in `Defense.__call__`
        if clean.shape != model.shape or (len(clean) and int(clean.labels.max()) >= model.classes):
            raise Refused(
                f"the clean images have shape {clean.shape} and {clean.classes} classes, "
                f"the model takes {model.shape} and has {model.classes}: lend images that fit"
            )
        if len(clean) < 8:
            raise Refused(f"{self.name} needs at least 8 clean images, not {len(clean)}")
        return clean.to(model.mean.device)

    def optimizer(self, parameters: Iterator[nn.Parameter]) -> Optimizer:
        """The protocol's optimiser: SGD without weight decay."""
        return SGD(parameters, self.lr, self.momentum, fused=True)

    def decay(self, epoch: int, epochs: int | None = None) -> float:
        """The factor on the learning rate in an epoch, counted from 0."""
        done = epoch / (epochs or self.epochs)
        return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01

    def batches(self, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of augmented pixels [n, c, h, w] in [0, 1] and labels [n]. An incomplete last batch is dropped."""
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
        """Trains for one epoch with cross-entropy and returns the mean loss, a scalar.

        Args:
            model: In the mode it is to be trained in; changed in place.
            learn: Its optimiser.
            images: The clean images.
            epoch: Number of the epoch, from 0, which sets the learning rate.
            epochs: Epochs of the schedule; None for `self.epochs`.
            stamp: Changes the pixels [n, c, h, w] of a batch; the labels stay the true ones.
        """
        set_lr([learn], self.decay(epoch, epochs))
        total, steps = torch.zeros(()), 0
        for pixels, labels in self.batches(images):
            loss = F.cross_entropy(model(stamp(pixels)), labels)
            descend(learn, loss)
            total, steps = total + loss.detach(), steps + 1
        return total / steps


def hold_out(images: Images, share: float) -> tuple[Images, Images]:
    """Splits images at random into training and held-out ones, `share` of all being held out; at least one of each."""
    order = torch.randperm(len(images), device=images.pixels.device)
    held = min(max(1, round(share * len(images))), len(images) - 1)
    return images.subset(order[held:]), images.subset(order[:held])


def accuracy_on(model: Classifier, images: Images, batch: int = 512) -> float:
    """The accuracy of a model on images, in [0, 1], in eval mode."""
    with evaluating(model), torch.no_grad():
        hits = [(model(pixels).argmax(1) == labels).sum() for pixels, labels in images.batches(batch)]
    return int(torch.stack(hits).sum()) / len(images)
