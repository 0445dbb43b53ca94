"""The search for triggers without data: the maximum over R of eq. 8, one universal trigger for each class.

Every trigger has the same form, ``clip(keep * x + add)``: a patch keeps nothing where it lies and adds itself, a faint
pattern keeps everything. Four families cover the field: patches at any place, patterns through a mask of a few pixels
at their own place (a network that flattens its features answers nowhere else), and over the whole image faint patterns
and a few waves.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam

from dhbe.classifier import Classifier
from dhbe.search.families import FEWEST, Faint, Family, Forms, Masked, Patches, Waves
from dhbe.steps import frozen

BETAS = (0.8, 0.95)
"""Of Adam in the search; a universal trigger is found within some dozen steps."""

FEW = 5
"""Classes below which standing out means little: of two classes none can, of three or four one soon does by chance."""

SMALLEST_SPREAD = 0.25
"""Of the margins of a family, in standard deviations of the teacher's logits: below, differences mean nothing."""


def lead(logits: Tensor, wanted: Tensor, usual: Tensor | None = None) -> Tensor:
    """How far the wanted class leads before the best other one, [n]: negative where another one leads.

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


class Search:
    """Families and their optimisers.

    The lead is sought without a ceiling: a backdoor's grows far beyond what any natural pattern reaches.
    """

    def __init__(
        self,
        classes: int,
        shape: tuple[int, int, int],
        patch: int,
        shown: float,
        change: float,
        wave: float,
        *,
        at_once: int = 128,
        away: bool = False,
    ) -> None:
        channels, side, _ = shape
        self.classes = classes
        self.at_once = at_once
        """Images in one pass; a step takes several passes, so that its memory stays that of a student's step."""
        self.aims = classes + away
        """Triggers in each family: one for each class, and perhaps one that leads anywhere but to the usual class."""
        pixels = max(shown * side**2, FEWEST)
        self.families: list[Family] = [
            Patches(self.aims, side, channels, patch),
            Masked(self.aims, side, channels, pixels),
            Masked(self.aims, side, channels, pixels / 2),
            Faint(self.aims, side, channels, change),
            Waves(self.aims, side, channels, wave),
        ]
        self.optimizers = [Adam(each.parameters(), each.step, betas=BETAS, fused=True) for each in self.families]

    def step(self, model: Classifier, number: int, pixels: Tensor, wanted: Tensor) -> Tensor:
        """One step of a family on images [n, c, h, w] towards classes [n], a few at a time; returns the mean lead."""
        reached = torch.zeros(())
        self.optimizers[number].zero_grad()
        with frozen(model):
            for some, aims in zip(pixels.split(self.at_once), wanted.split(self.at_once), strict=True):
                with torch.no_grad():
                    usual = model(some).argmax(1) if self.aims > self.classes else None
                ahead = lead(model(self.families[number].forms(aims)(some)), aims, usual).sum() / len(pixels)
                (-ahead).backward()
                reached += ahead.detach()
        self.optimizers[number].step()
        return reached

    @torch.no_grad()
    def lead(self, model: Classifier, family: Family, wanted: Tensor, pixels: Tensor) -> Tensor:
        """Mean lead of the triggers of classes [k], each over those images that `model` takes for another class, [k].

        With no image of another class nothing can lead there: 0.
        """
        answer, means = model(pixels).argmax(1), []
        for label in wanted.tolist():
            others = pixels[answer != label]
            labels = torch.full((len(others),), label)
            ahead = [
                lead(model(family.forms(of)(some)), of)
                for some, of in zip(others.split(self.at_once), labels.split(self.at_once), strict=True)
            ]
            means.append(torch.cat(ahead).mean() if len(others) else torch.zeros(()))
        return torch.stack(means) if means else torch.zeros(0)

    def leads(self, model: Classifier, pixels: Tensor) -> Tensor:
        """The same for all families and classes [families, classes]."""
        wanted = torch.arange(self.classes)
        return torch.stack([self.lead(model, family, wanted, pixels) for family in self.families])


def anomalies(leads: Tensor, spread: Tensor) -> Tensor:
    """How far each class stands out of its family [families, classes], in robust standard deviations.

    The median and the median absolute deviation x 1.4826, as in Neural Cleanse (Wang et al. 2019), of leads instead of
    sizes, and upwards only.

    Args:
        leads: How far each class leads under its trigger, or how much more than without [families, classes].
        spread: Standard deviation of the teacher's logits, to tell what is nothing.
    """
    middle = leads.quantile(0.5, dim=1, keepdim=True)
    deviation = 1.4826 * (leads - middle).abs().quantile(0.5, dim=1, keepdim=True)
    return (leads - middle) / deviation.clamp_min(SMALLEST_SPREAD * spread.item())


SIDES = (1, 2, 3, 4, 5, 6)
"""Of the squares that `compact` tries, in pixels of an image of `UNIT` px; larger images have larger ones."""

REACH = 2
"""How far from the mask's centre they may lie, in the same pixels."""

UNIT = 32


@torch.no_grad()
def compact(model: Classifier, form: Forms, wanted: int, pixels: Tensor) -> tuple[Forms, Tensor]:
    """The squares that act most where a mask lies: what an attacker stamps is compact.

    A mask found by gradients spreads over the trigger and around it, and a student that ignores it may still answer
    the sharper original. So squares of 1 to 6 px around the mask's centre are tried, filled with the pattern as found,
    with its nearest pure colours, white, black, its mean colour, or the pure colour nearest to that.

    Args:
        model: The teacher.
        form: One trigger.
        wanted: Its class.
        pixels: A few images [n, c, h, w].

    Returns:
        For each size and filling the one at the best place, and their mean leads [36].
    """
    mask, pattern = 1 - form.keep[0], form.add[0] / (1 - form.keep[0]).clamp_min(1e-6)
    height, width = mask.shape[-2:]
    window = 2 * REACH + 1
    weight = F.avg_pool2d(mask[None], window, stride=1, padding=REACH)[0, 0]
    row, column = divmod(int(weight.argmax()), width)
    mean, plain = (pattern * mask).sum((1, 2), keepdim=True) / mask.sum(), torch.ones_like(pattern)
    fillings = [pattern, pattern.round(), plain, 0 * plain, mean * plain, mean.round() * plain]
    best, leads = [], []
    unit = max(1, round(height / UNIT))
    for side in (unit * side for side in SIDES):
        boxes = _boxes(row - side // 2, column - side // 2, side, unit, mask)
        for filling in fillings:
            squares = Forms(1 - boxes, boxes * filling)
            triggered = squares[torch.arange(len(boxes)).repeat_interleave(len(pixels))](
                pixels.repeat(len(boxes), 1, 1, 1)
            )
            reached = lead(model(triggered), torch.full((len(triggered),), wanted)).view(len(boxes), -1).mean(1)
            most = reached.argmax()
            best.append(squares[most[None]])
            leads.append(reached[most])
    return Forms(torch.cat([b.keep for b in best]), torch.cat([b.add for b in best])), torch.stack(leads)


def _boxes(row: int, column: int, side: int, unit: int, like: Tensor) -> Tensor:
    """Squares of ones [n, 1, h, w] at places near a row and column, inside the image."""
    most = like.shape[-1] - side
    near = [unit * step for step in range(-REACH, REACH + 1)]
    places = {(min(max(row + down, 0), most), min(max(column + right, 0), most)) for down in near for right in near}
    boxes = torch.zeros(len(places), *like.shape, device=like.device)
    for box, (top, left) in zip(boxes, sorted(places), strict=True):
        box[:, top : top + side, left : left + side] = 1
    return boxes
