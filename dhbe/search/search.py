"""Trigger inversion by gradient: one universal trigger for each class in each family, and the margin it reaches.

The objective is the margin of a class, its logit minus that of the best other class, without an upper bound: a backdoor's
margin grows far beyond that of any natural pattern.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam

from dhbe.classifier import Classifier
from dhbe.search.families import FAMILIES, UNIT, Bounds, Family, Overlay
from dhbe.settings import Setting
from dhbe.steps import frozen

BETAS = (0.8, 0.95)
"""Adam's betas; a universal trigger is found within a few dozen steps."""

FEW = 5
"""Number of classes below which an outlier means little: of two none can stand out, of three or four one may by chance."""


def margin(logits: Tensor, wanted: Tensor, usual: Tensor | None = None) -> Tensor:
    """The logit of the wanted class minus that of the best other class [n]; negative where another class wins.

    Args:
        logits: Logits of triggered images [n, classes].
        wanted: Classes [n]; `classes`, the number after the last one, means any class but the usual one.
        usual: Predicted classes of the images without triggers [n]; needed where that number occurs.
    """
    away = wanted == logits.shape[1]
    named = wanted if usual is None else torch.where(away, usual, wanted)
    own = logits.gather(1, named[:, None]).squeeze(1)
    ahead = own - logits.scatter(1, named[:, None], -torch.inf).amax(1)
    return torch.where(away, -ahead, ahead)


def baseline_margin(logits: Tensor) -> Tensor:
    """Mean margin of each class [classes] without a trigger, over the images taken for another class.

    Args:
        logits: Logits of clean images [n, classes].
    """
    rows = []
    for label in range(logits.shape[1]):
        others = logits[logits.argmax(1) != label]
        rows.append(margin(others, torch.full((len(others),), label)).mean() if len(others) else torch.zeros(()))
    return torch.stack(rows)


class Search:
    """All trigger families and their optimisers.

    Args:
        model: The model to be searched, for its shape and number of classes.
        bounds: Bounds of the families.
        at_once: Images per forward pass; a step may take several passes, so that it needs no more memory than a student
            step.
        away: Besides a trigger for each class, search for one that leads to any class but the usual one.
    """

    def __init__(self, model: Classifier, bounds: Bounds, *, at_once: int = 128, away: bool = False) -> None:
        self.classes, self.at_once = model.classes, at_once
        self.aims = model.classes + away
        """Triggers in each family."""
        self.families: list[Family] = [kind(self.aims, model.shape, bounds) for kind in FAMILIES]
        self.optimizers = [Adam(each.parameters(), each.lr, betas=BETAS, fused=True) for each in self.families]

    def restart(self, fresh: "Search") -> None:
        """Takes over the triggers of a fresh search, and forgets the momenta."""
        for old, new in zip(self.families, fresh.families, strict=True):
            old.load_state_dict(new.state_dict())
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def step(self, model: Classifier, number: int, pixels: Tensor, wanted: Tensor) -> Tensor:
        """Takes one optimiser step for one family, in passes of `at_once` images.

        Args:
            model: In eval mode.
            number: Index of the family in `families`.
            pixels: Images [n, c, h, w] in [0, 1].
            wanted: The class that each image is to be led to [n].

        Returns:
            The mean margin in logits, a scalar.
        """
        reached = torch.zeros(())
        self.optimizers[number].zero_grad()
        with frozen(model):
            for some, aims in zip(pixels.split(self.at_once), wanted.split(self.at_once), strict=True):
                with torch.no_grad():
                    usual = model(some).argmax(1) if self.aims > self.classes else None
                triggered = self.families[number].triggers(aims)(some)
                ahead = margin(model(triggered), aims, usual).sum() / len(pixels)
                (-ahead).backward()
                reached += ahead.detach()
        self.optimizers[number].step()
        return reached

    @torch.no_grad()
    def margin(self, model: Classifier, family: Family, wanted: Tensor, pixels: Tensor) -> Tensor:
        """Mean margin of classes under their triggers, each over the images that `model` takes for another class.

        Args:
            model: In eval mode.
            family: The family of the triggers.
            wanted: The classes [k].
            pixels: Images [n, c, h, w] in [0, 1].

        Returns:
            Margins in logits [k]; 0 where all images are of the class itself.
        """
        answer, means = model(pixels).argmax(1), []
        for label in wanted.tolist():
            others = pixels[answer != label]
            if not len(others):  # not every network takes no images
                means.append(torch.zeros(()))
                continue
            labels = torch.full((len(others),), label)
            ahead = [
                margin(model(family.triggers(of)(some)), of)
                for some, of in zip(others.split(self.at_once), labels.split(self.at_once), strict=True)
            ]
            means.append(torch.cat(ahead).mean())
        return torch.stack(means) if means else torch.zeros(0)

    def margins(self, model: Classifier, pixels: Tensor) -> Tensor:
        """`margin` for all families and classes [families, classes]."""
        wanted = torch.arange(self.classes)
        return torch.stack([self.margin(model, family, wanted, pixels) for family in self.families])


def middle_and_deviation(values: Tensor) -> tuple[Tensor, Tensor]:
    """The median of the last axis, and 1.4826 x the median absolute deviation, the standard deviation of normal values."""
    middle = values.quantile(0.5, dim=-1)
    return middle, 1.4826 * (values - middle[..., None]).abs().quantile(0.5, dim=-1)


def anomalies(margins: Tensor, least: Tensor) -> Tensor:
    """The anomaly of each class in its family [families, classes]: (margin - median) / (1.4826 MAD).

    As in Neural Cleanse (Wang et al. 2019), but of margins instead of mask sizes, and for large values.

    Args:
        margins: Margins of the classes under their triggers, or the triggers' gains [families, classes].
        least: Lower bound of the deviation, a scalar: smaller differences mean nothing.
    """
    middle, deviation = (each[:, None] for each in middle_and_deviation(margins))
    return (margins - middle) / deviation.clamp_min(least.item())


@dataclass(frozen=True)
class Squares:
    """Square refinement, for stamped triggers are compact.

    A mask found by gradient is spread around the true trigger, and a student that ignores it may still respond to the
    sharper original. So squares around the mask's centre are tested, filled with the pattern as found, with the pattern
    rounded to pure colours, with white, with black, with its mean colour, or with that rounded to a pure colour.
    """

    square_sides: Annotated[
        tuple[int, ...], Setting("sides of the squares that are tested, in pixels of a 32 px image", least=1)
    ] = (1, 2, 3, 4, 5, 6)
    square_reach: Annotated[int, Setting("largest distance of the squares from a mask's centre, in the same unit")] = 2
    square_images: Annotated[int, Setting("images on which the squares are tested", least=1)] = 4

    @torch.no_grad()
    def tried(self, model: Classifier, trigger: Overlay, wanted: int, pixels: Tensor) -> tuple[Overlay, Tensor]:
        """The strongest squares near a mask.

        Args:
            model: The teacher.
            trigger: One trigger with a mask.
            wanted: Its class.
            pixels: A few images [n, c, h, w] in [0, 1].

        Returns:
            For each side and filling the square at the best position, and their mean margins in logits [sides x 6].
        """
        mask, pattern = 1 - trigger.keep[0], trigger.add[0] / (1 - trigger.keep[0]).clamp_min(1e-6)
        height, width = mask.shape[-2:]
        window = 2 * self.square_reach + 1
        weight = F.avg_pool2d(mask[None], window, stride=1, padding=self.square_reach)[0, 0]
        row, column = divmod(int(weight.argmax()), width)
        mean, plain = (pattern * mask).sum((1, 2), keepdim=True) / mask.sum(), torch.ones_like(pattern)
        fillings = [pattern, pattern.round(), plain, 0 * plain, mean * plain, mean.round() * plain]
        best, margins = [], []
        unit = max(1, round(height / UNIT))
        for side in (unit * side for side in self.square_sides):
            boxes = self._boxes(row - side // 2, column - side // 2, side, unit, mask)
            for filling in fillings:
                squares = Overlay(1 - boxes, boxes * filling)
                triggered = squares[torch.arange(len(boxes)).repeat_interleave(len(pixels))](
                    pixels.repeat(len(boxes), 1, 1, 1)
                )
                labels = torch.full((len(triggered),), wanted)
                reached = margin(model(triggered), labels).view(len(boxes), -1).mean(1)
                most = reached.argmax()
                best.append(squares[most[None]])
                margins.append(reached[most])
        return Overlay.joined(best), torch.stack(margins)

    def _boxes(self, row: int, column: int, side: int, unit: int, like: Tensor) -> Tensor:
        """Squares of ones [n, 1, h, w] at positions near a row and column, inside the image."""
        most = like.shape[-1] - side
        near = [unit * step for step in range(-self.square_reach, self.square_reach + 1)]
        places = {(min(max(row + down, 0), most), min(max(column + right, 0), most)) for down in near for right in near}
        boxes = torch.zeros(len(places), *like.shape, device=like.device)
        for box, (top, left) in zip(boxes, sorted(places), strict=True):
            box[:, top : top + side, left : left + side] = 1
        return boxes
