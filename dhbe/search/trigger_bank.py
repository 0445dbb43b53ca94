"""What a run knows of the triggers that it found."""

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.search.families import Forms
from dhbe.search.search import lead

NEVER_ZERO = 1e-6
"""Keeps a draw possible when no trigger acts any more."""

COPIES = 8
"""Of a small trigger that may be shown beside it, as x9 has it."""

ROOM = 0.25
"""Share of an image that a trigger and its copies may cover; what hides the image itself teaches nothing."""

AT_ONCE = 128
"""Images in one pass when triggers are tried."""

STRONGEST = 16
"""Triggers of which it is seen whether they act at other places too."""


class TriggerBank(nn.Module):
    """The triggers found, of which none is forgotten until the memory is full; then the weakest goes first."""

    keep: Tensor
    add: Tensor
    wanted: Tensor
    """The class that each leads to [size]."""
    strength: Tensor
    """Its mean lead when it was found [size]; minus infinity where there is none."""
    success: Tensor
    """The share of images that it brought to its class when it was tried last [size]."""
    anomaly: Tensor
    """How far each class stands out of each family [families, classes], in robust standard deviations."""
    leads: Tensor
    """How far each class led in the teacher [families, classes]."""
    surveyed: Tensor
    """Rounds that the search in the teacher takes."""
    agreement: Tensor
    """The share of images for which student and teacher chose the same class when they were compared last."""
    sought: Tensor
    """Which triggers are worth remembering [families, classes]: those that stand out, or all if none does."""
    suspects: Tensor
    """Which classes stand out [classes]."""
    anywhere: Tensor
    """Whether the teacher answers its triggers at other places too; one that flattens its features does not."""

    def __init__(self, size: int, shape: Shape, classes: int, families: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.register_buffer("keep", torch.ones(size, 1, height, width))
        self.register_buffer("add", torch.zeros(size, channels, height, width))
        self.register_buffer("wanted", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("strength", torch.full((size,), -torch.inf))
        self.register_buffer("success", torch.zeros(size))
        self.register_buffer("anomaly", torch.zeros(families, classes))
        self.register_buffer("leads", torch.zeros(families, classes))
        self.register_buffer("surveyed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("agreement", torch.ones(()))
        self.register_buffer("sought", torch.ones(families, classes, dtype=torch.bool))
        self.register_buffer("suspects", torch.zeros(classes, dtype=torch.bool))
        self.register_buffer("anywhere", torch.ones((), dtype=torch.bool))

    def __len__(self) -> int:
        return int((self.strength > -torch.inf).sum())

    @property
    def backdoored(self) -> bool:
        """Whether a class stands out."""
        return bool(self.suspects.any())

    @property
    def natural(self) -> Tensor:
        """The median lead of each family in the teacher [families]."""
        return self.leads.quantile(0.5, dim=1)

    def note(self, leads: Tensor, anomaly: Tensor, outliers: Tensor) -> None:
        """Writes down what the search in the teacher came to; `outliers` are bool [families, classes]."""
        self.leads, self.anomaly, self.suspects = leads, anomaly, outliers.any(0)
        self.sought = outliers if self.backdoored else torch.ones_like(outliers)

    def take(self, forms: Forms, wanted: Tensor, strength: Tensor) -> None:
        """Takes triggers in, in place of empty ones and then of weaker ones."""
        for keep, add, label, value in zip(forms.keep, forms.add, wanted, strength, strict=True):
            weakest = self.strength.argmin()
            if value > self.strength[weakest]:
                self.keep[weakest], self.add[weakest] = keep, add
                self.wanted[weakest], self.strength[weakest] = label, value

    def forms(self, index: Tensor) -> Forms:
        """The triggers at places [n]."""
        return Forms(self.keep[index], self.add[index])

    def draw(self, count: int) -> Forms:
        """Triggers by chance [count], more often those that still act; half of them weaker.

        Where triggers act anywhere, the weaker ones are at other places, and small ones come alone half of the time, else
        with as many copies as there is room for: what one patch no longer does, several may (section 5.3 of the paper,
        amplified triggers). Nothing here waits for the device.
        """
        forms = self.forms(torch.multinomial(self.success + NEVER_ZERO, count, replacement=True))
        weaker, several = torch.rand(2, count) < 0.5
        opacity = torch.where(weaker, 0.5 + 0.5 * torch.rand(count), 1.0).view(-1, 1, 1, 1)
        drawn = forms.weaker(opacity).moved(self._shifts(count) * (weaker & self.anywhere)[:, None])
        covered = (1 - forms.keep).mean((1, 2, 3))
        room = (ROOM / covered).floor() - 1  # endless where a trigger is added to the whole image, which has no copies
        several = several & self.anywhere & (covered > 0)
        copies = several * torch.randint(1, COPIES + 1, (count,)).minimum(room.clamp_min(0))
        for number in range(COPIES):
            laid = (copies > number).float().view(-1, 1, 1, 1)
            drawn = drawn.under(forms.moved(self._shifts(count)).weaker(laid))
        return drawn

    def _shifts(self, count: int) -> Tensor:
        """Rows and columns by chance [count, 2]."""
        return torch.randint(self.keep.shape[-1], (count, 2))

    @torch.no_grad()
    def tried(self, model: Classifier, pixels: Tensor) -> Tensor:
        """The share of images [n, c, h, w] that each trigger brings to its class [size]."""
        known = (self.strength > -torch.inf).nonzero().flatten()
        success = torch.zeros_like(self.success)
        success[known] = gains(model, self.forms(known), self.wanted[known], pixels)
        return success

    def retry(self, model: Classifier, pixels: Tensor) -> None:
        """SurveyState `tried`."""
        self.success = self.tried(model, pixels)

    @torch.no_grad()
    def settle(self, teacher: Classifier, pixels: Tensor) -> None:
        """SurveyState what the teacher answers: each trigger where it was found, and whether elsewhere too."""
        self.retry(teacher, pixels)
        strongest = self.success.argsort(descending=True)[:STRONGEST]
        elsewhere = self.forms(strongest).moved(self._shifts(len(strongest)))
        moved = gains(teacher, elsewhere, self.wanted[strongest], pixels)
        self.anywhere = moved.sum() > self.success[strongest].sum() / 2


def gains(model: Classifier, forms: Forms, wanted: Tensor, pixels: Tensor) -> Tensor:
    """The share of images that each trigger brings to its class [k]; those that almost go there count too.

    It is the mean gain of the leads' logistic function.

    Args:
        model: What is triggered.
        forms: The triggers.
        wanted: Their classes [k].
        pixels: The images [n, c, h, w].
    """
    if not len(wanted):
        return torch.zeros(0)
    clean, found = model(pixels), []
    for some in torch.arange(len(wanted)).split(max(1, AT_ONCE // len(pixels))):
        each = some.repeat_interleave(len(pixels))
        triggered = model(forms[each](pixels.repeat(len(some), 1, 1, 1)))
        before = lead(clean.repeat(len(some), 1), wanted[each]).sigmoid()
        gained = lead(triggered, wanted[each]).sigmoid() - before
        found.append(gained.clamp_min(0).view(len(some), -1).mean(1))
    return torch.cat(found)
