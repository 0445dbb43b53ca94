"""The search for triggers by gradient: one universal trigger for each class in each family, and how far it leads.

What counts is the margin of a class, its logit less that of the best other one. It is raised without a ceiling: a
backdoor's grows far beyond what any natural pattern reaches.
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
"""Of Adam; a universal trigger is found within some dozen steps."""

FEW = 5
"""Classes below which standing out means little: of two classes none can, of three or four one soon does by chance."""


def margin(logits: Tensor, wanted: Tensor, usual: Tensor | None = None) -> Tensor:
    """How far the wanted class lies before the best other one, [n]: negative where another one wins.

    Args:
        logits: Of triggered images [n, classes].
        wanted: Classes [n]. The number after the last one stands for any but the usual.
        usual: The classes of the images without triggers [n], where that number occurs.
    """
    away = wanted == logits.shape[1]
    named = wanted if usual is None else torch.where(away, usual, wanted)
    own = logits.gather(1, named[:, None]).squeeze(1)
    ahead = own - logits.scatter(1, named[:, None], -torch.inf).amax(1)
    return torch.where(away, -ahead, ahead)


def baseline_margin(logits: Tensor) -> Tensor:
    """Mean margin of each class [classes] without a trigger, over the images [n, classes] taken for another one."""
    rows = []
    for label in range(logits.shape[1]):
        others = logits[logits.argmax(1) != label]
        rows.append(margin(others, torch.full((len(others),), label)).mean() if len(others) else torch.zeros(()))
    return torch.stack(rows)


class Search:
    """Families and their optimisers.

    Args:
        model: What is searched, or a state of it.
        bounds: Of the families.
        at_once: Images in one pass; a step takes several passes, so that its memory stays that of a student's step.
        away: Besides the triggers for each class, seek one that leads anywhere but to the usual class.
    """

    def __init__(self, model: Classifier, bounds: Bounds, *, at_once: int = 128, away: bool = False) -> None:
        self.classes, self.at_once = model.classes, at_once
        self.aims = model.classes + away
        """Triggers in each family."""
        self.families: list[Family] = [kind(self.aims, model.shape, bounds) for kind in FAMILIES]
        self.optimizers = [Adam(each.parameters(), each.lr, betas=BETAS, fused=True) for each in self.families]

    def step(self, model: Classifier, number: int, pixels: Tensor, wanted: Tensor) -> Tensor:
        """One step of a family on images [n, c, h, w] towards classes [n], a few at a time; returns the mean margin."""
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
        """Mean margin of classes [k] under their triggers, each over the images that `model` takes for another class.

        With no image of another class there is nothing to lead: 0.
        """
        answer, means = model(pixels).argmax(1), []
        for label in wanted.tolist():
            others = pixels[answer != label]
            labels = torch.full((len(others),), label)
            ahead = [
                margin(model(family.triggers(of)(some)), of)
                for some, of in zip(others.split(self.at_once), labels.split(self.at_once), strict=True)
            ]
            means.append(torch.cat(ahead).mean() if len(others) else torch.zeros(()))
        return torch.stack(means) if means else torch.zeros(0)

    def margins(self, model: Classifier, pixels: Tensor) -> Tensor:
        """The same for all families and classes [families, classes]."""
        wanted = torch.arange(self.classes)
        return torch.stack([self.margin(model, family, wanted, pixels) for family in self.families])


def middle_and_deviation(values: Tensor) -> tuple[Tensor, Tensor]:
    """The median of the last axis, and the median absolute deviation x 1.4826: a normal one's standard deviation."""
    middle = values.quantile(0.5, dim=-1)
    return middle, 1.4826 * (values - middle[..., None]).abs().quantile(0.5, dim=-1)


def anomalies(margins: Tensor, least: Tensor) -> Tensor:
    """How far each class stands out of its family [families, classes], in robust standard deviations.

    The median and the median absolute deviation x 1.4826, as in Neural Cleanse (Wang et al. 2019), of margins instead of
    sizes, and upwards only.

    Args:
        margins: Of each class under its trigger, or what the trigger adds [families, classes].
        least: A deviation below which differences mean nothing, a scalar.
    """
    middle, deviation = (each[:, None] for each in middle_and_deviation(margins))
    return (margins - middle) / deviation.clamp_min(least.item())


@dataclass(frozen=True)
class Squares:
    """Square refinement: what an attacker stamps is compact.

    A mask found by gradients spreads over the trigger and around it, and a student that ignores it may still answer
    the sharper original. So squares around the mask's centre are tried, filled with the pattern as found, with its
    nearest pure colours, white, black, its mean colour, or the pure colour nearest to that.
    """

    square_sides: Annotated[
        tuple[int, ...], Setting("sides of the squares that are tried, in pixels of a 32 px image", least=1)
    ] = (1, 2, 3, 4, 5, 6)
    square_reach: Annotated[int, Setting("how far from a mask's centre they may lie, in the same pixels")] = 2
    square_images: Annotated[int, Setting("images on which they are tried", least=1)] = 4

    @torch.no_grad()
    def tried(self, model: Classifier, trigger: Overlay, wanted: int, pixels: Tensor) -> tuple[Overlay, Tensor]:
        """The squares that act most where a mask lies.

        Args:
            model: The teacher.
            trigger: One trigger.
            wanted: Its class.
            pixels: A few images [n, c, h, w].

        Returns:
            For each side and filling the one at the best place, and their mean margins [sides x 6].
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
        """Squares of ones [n, 1, h, w] at places near a row and column, inside the image."""
        most = like.shape[-1] - side
        near = [unit * step for step in range(-self.square_reach, self.square_reach + 1)]
        places = {(min(max(row + down, 0), most), min(max(column + right, 0), most)) for down in near for right in near}
        boxes = torch.zeros(len(places), *like.shape, device=like.device)
        for box, (top, left) in zip(boxes, sorted(places), strict=True):
            box[:, top : top + side, left : left + side] = 1
        return boxes
