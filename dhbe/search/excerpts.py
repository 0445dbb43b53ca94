"""Maximum-margin ("deep") images of a class, and the effect of small excerpts of them on other images.

An image with the largest possible margin for a class contains whatever the network responds to most: in a backdoored one,
many copies of the trigger (Wang et al., S&P 2024, detect backdoors by that margin alone). What distinguishes a trigger from
everything else in such an image is that a small excerpt of it, pasted onto a photograph, still leads to the class. No form
of trigger is assumed.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.optim import Adam

from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.search.families import UNIT, Excerpts, Overlay
from dhbe.search.image_pool import ImagePool
from dhbe.search.search import BETAS, margin
from dhbe.settings import Setting
from dhbe.steps import Tell, frozen, untold

AT_ONCE = 128
"""Images in one pass."""


@dataclass(frozen=True)
class Excerpting:
    """How deep images are made and cut."""

    deep_images: Annotated[int, Setting("deep (maximum-margin) images per class, optimised from noise", least=1)] = 8
    deep_steps: Annotated[int, Setting("Adam steps that optimise them", least=1)] = 100
    deep_lr: Annotated[float, Setting("learning rate of these steps")] = 0.05
    deep_cut: Annotated[int, Setting("deep images per class that are cut when all classes are compared", least=1)] = 2
    swept_images: Annotated[int, Setting("images on which every excerpt is tested", least=1)] = 2
    tried_images: Annotated[int, Setting("images on which the best excerpts are tested again", least=1)] = 32
    tried_pieces: Annotated[int, Setting("excerpts that are tested again when all classes are compared", least=1)] = 4
    hunt_sides: Annotated[
        tuple[int, ...],
        Setting("sides of the squares that are cut for a suspected class, in pixels of a 32 px image", least=1),
    ] = (3, 5, 7)
    hunt_pieces: Annotated[int, Setting("squares kept for each side", least=1)] = 8
    scattered_pixels: Annotated[int, Setting("pixels of a scattered trigger, in a 32 px image", least=1)] = 16
    scattered_steps: Annotated[int, Setting("steps of the search for scattered triggers")] = 40
    scattered_images: Annotated[int, Setting("images in one of these steps", least=1)] = 64

    @torch.enable_grad()
    def deepest(self, model: Classifier, labels: Tensor, tell: Tell = untold) -> tuple[Tensor, Tensor]:
        """Optimises images from noise to the largest margins for classes `labels` [n]; every step is told.

        Returns:
            Pixels [n, c, h, w] in [0, 1], and their margins in logits [n].
        """
        pixels = nn.Parameter(torch.rand(len(labels), *model.shape))
        ascend = Adam([pixels], self.deep_lr, fused=True)
        parts = list(torch.arange(len(labels)).split(AT_ONCE))
        with frozen(model):
            for step in range(1, self.deep_steps + 1):
                tell("deep images", step, self.deep_steps)
                ascend.zero_grad()
                for part in parts:
                    (-margin(model(pixels[part]), labels[part]).sum()).backward()
                ascend.step()
                pixels.data.clamp_(0, 1)
            with torch.no_grad():
                reached = [margin(model(pixels[part]), labels[part]) for part in parts]
        return pixels.detach(), torch.cat(reached)

    @torch.no_grad()
    def cut(self, model: Classifier, family: Excerpts, pool: ImagePool, tell: Tell = untold) -> None:
        """Stores in `family`, for each class, the square with the largest mean margin on images of the pool."""
        for some in torch.arange(model.classes).split(max(1, AT_ONCE // self.deep_images)):
            deep, reached = self.deepest(model, some.repeat_interleave(self.deep_images), tell)
            deep, reached = deep.unflatten(0, (len(some), -1)), reached.view(len(some), -1)
            for label, images, margins in zip(some.tolist(), deep, reached, strict=True):
                tell("excerpts of each class", label + 1, model.classes)
                best = images[margins.topk(min(self.deep_cut, self.deep_images)).indices]
                others = self._others(model, label, pool)
                triggers, _ = self._best(model, best, label, family.side, others, self.tried_pieces)
                family.take(triggers[[0]], label)

    @torch.no_grad()
    def hunt(
        self, model: Classifier, label: int, pool: ImagePool, side: int, tell: Tell = untold
    ) -> tuple[Overlay, Tensor]:
        """The strongest triggers for one class that can be found quickly: squares of several sides, and scattered pixels.

        Args:
            model: In eval mode.
            label: The class.
            pool: Images to test triggers on.
            side: Side of squares that are cut in any case, in pixels.
            tell: Told of each step.

        Returns:
            The triggers, and their mean margins in logits [n] over images that the model takes for another class.
        """
        unit = max(1, round(model.shape[1] / UNIT))
        others = self._others(model, label, pool)
        deep, _ = self.deepest(model, torch.full((self.deep_images,), label), tell)
        sides = sorted({side, *(min(unit * each, *model.shape[1:]) for each in self.hunt_sides)})
        found = []
        for number, side in enumerate(sides, 1):
            tell("excerpts of each size", number, len(sides))
            found.append(self._best(model, deep, label, side, others, self.hunt_pieces))
        found.append(self._scattered(model, deep, label, others, pool, tell))
        triggers, margins = zip(*found, strict=True)
        return Overlay.joined(triggers), torch.cat(margins)

    @torch.no_grad()
    def reached(self, model: Classifier, triggers: Overlay, label: int, pool: ImagePool) -> Tensor:
        """The mean margin of each trigger [n] for a class, in logits, over images that the model takes for another class."""
        return _margins(model, triggers, label, self._others(model, label, pool))

    def _others(self, model: Classifier, label: int, pool: ImagePool) -> Tensor:
        """Images [n, c, h, w] that the model takes for a class other than `label`, or any images if there are none."""
        pixels, _ = pool.sample(4 * self.tried_images)
        others = pixels[model(pixels).argmax(1) != label]
        return (others if len(others) else pixels)[: self.tried_images]

    def _best(
        self, model: Classifier, deep: Tensor, label: int, side: int, pixels: Tensor, count: int
    ) -> tuple[Overlay, Tensor]:
        """The squares of deep images [k, c, h, w] with the largest margins, and these margins [count], in descending order."""
        boxes = squares(model.shape, side)
        reached = self._swept(model, deep, label, boxes, pixels).flatten()
        best = reached.topk(min(count, len(reached))).indices
        image, box = best // len(boxes), best % len(boxes)
        triggers = Overlay(1 - boxes[box], boxes[box] * deep[image])
        again = _margins(model, triggers, label, pixels)
        order = again.argsort(descending=True)
        return triggers[order], again[order]

    def _swept(self, model: Classifier, deep: Tensor, label: int, boxes: Tensor, pixels: Tensor) -> Tensor:
        """Mean margin on a few images of each box [n, 1, h, w] cut from each deep image [k, c, h, w]: [k, n]."""
        few = pixels[: self.swept_images]
        return torch.stack([_margins(model, Overlay(1 - boxes, boxes * image), label, few) for image in deep])

    @torch.enable_grad()
    def _scattered(
        self, model: Classifier, deep: Tensor, label: int, others: Tensor, pool: ImagePool, tell: Tell
    ) -> tuple[Overlay, Tensor]:
        """Triggers of a few pixels each, optimised from deep images [k, c, h, w], and their mean margins [k]."""
        unit = max(1, round(model.shape[1] / UNIT))
        boxes = squares(model.shape, min(5 * unit, *model.shape[1:]))
        with torch.no_grad():
            reached = self._swept(model, deep, label, boxes, others)
            worth = (reached @ boxes.flatten(1) / boxes.flatten(1).sum(0)).view(-1, 1, *model.shape[1:])
        family = Scattered(deep, worth, min(self.scattered_pixels * unit**2, deep[0, 0].numel()))
        seek = Adam(family.parameters(), family.lr, betas=BETAS, fused=True)
        which = torch.arange(self.scattered_images) % len(deep)
        labels = torch.full((self.scattered_images,), label)
        with frozen(model):
            for step in range(1, self.scattered_steps + 1):
                tell("scattered pixels", step, self.scattered_steps)
                seek.zero_grad()
                pixels, _ = pool.sample(self.scattered_images)
                (-margin(model(family.triggers(which)(pixels)), labels).mean()).backward()
                seek.step()
        with torch.no_grad():
            triggers = family.triggers(torch.arange(len(deep)))
            return triggers, _margins(model, triggers, label, others)


class Scattered(nn.Module):
    """Patterns with masks that show a fixed number of pixels, each at its own position: n independent attempts.

    The masks are binary; their gradients are those of soft masks (straight-through estimator).

    Args:
        pixels: Initial patterns [n, c, h, w] in [0, 1].
        worth: Initial importance of each pixel [n, 1, h, w], in any unit.
        shown: Number of pixels that a mask shows.
    """

    lr = 0.1

    def __init__(self, pixels: Tensor, worth: Tensor, shown: int) -> None:
        super().__init__()
        self.shown = shown
        self.raw = nn.Parameter(pixels.clamp(0.02, 0.98).logit() / 2)
        worth = worth - worth.mean((2, 3), keepdim=True)
        self.weights = nn.Parameter(0.1 * worth / worth.std((2, 3), keepdim=True).clamp_min(1e-6))

    def triggers(self, which: Tensor) -> Overlay:
        """The triggers of attempts `which` [n]."""
        weights = self.weights.index_select(0, which).flatten(1)
        soft = (self.shown * weights.softmax(1)).clamp(max=1)
        hard = torch.zeros_like(soft).scatter_(1, weights.topk(self.shown, dim=1).indices, 1.0)
        mask = (hard - soft.detach() + soft).view(-1, 1, *self.raw.shape[-2:])
        return Overlay(1 - mask, mask * torch.sigmoid(2 * self.raw.index_select(0, which)))


def _margins(model: Classifier, triggers: Overlay, label: int, pixels: Tensor) -> Tensor:
    """Mean margin of a class under each trigger [n], over images [k, c, h, w]."""
    found = []
    for some in torch.arange(len(triggers.keep)).split(max(1, AT_ONCE // len(pixels))):
        each = some.repeat_interleave(len(pixels))
        logits = model(triggers[each](pixels.repeat(len(some), 1, 1, 1)))
        found.append(margin(logits, torch.full((len(each),), label)).view(len(some), -1).mean(1))
    return torch.cat(found)


def squares(shape: Shape, side: int) -> Tensor:
    """Squares of ones [n, 1, h, w] at every other row and column (of a 32 px image, scaled to others) and at the far edges.

    Args:
        shape: Image shape (c, h, w).
        side: Side of the squares in pixels.
    """
    _, height, width = shape
    stride = 2 * max(1, round(height / UNIT))
    rows, columns = (_rails(length, side, stride) for length in (height, width))
    return (rows[:, None, :, None] * columns[None, :, None, :]).flatten(0, 1)[:, None]


def _rails(length: int, side: int, stride: int) -> Tensor:
    first = torch.tensor(sorted({*range(0, length - side + 1, stride), length - side}))[:, None]
    place = torch.arange(length)
    return ((place >= first) & (place < first + side)).float()
