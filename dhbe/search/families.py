"""Families of triggers."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dhbe.steps import lay

NAMES = ("patches", "masked", "masked_half", "faint", "waves")
"""Of the families, in the order of `Search`."""

LOCAL = 3
"""The first families, whose triggers lie at a place; those of the others lie over the whole image. What answers a patch
answers some patterns over the whole image too, which no student can ignore without losing that class: they are restricted
only where they stand out further than any patch and a third as far as what stands out most, and then all together, for none makes all of what was added there."""

ACCUSING = 4
"""The first families: what stands out of them accuses a model. A wave alone does not: many a clean class has its own,
and while the eraser may restrict it at little cost, an accusation must not rest on it."""


FEWEST = 12
"""Pixels that a masked trigger may show in the smallest of images."""


@dataclass(frozen=True, eq=False)
class Forms:
    """Triggers [n]: what they keep of an image [n, 1, h, w], in [0, 1], and what they add [n, c, h, w]."""

    keep: Tensor
    add: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """Triggered copies of pixels [n, c, h, w] in [0, 1], each with its own trigger."""
        return (self.keep * pixels + self.add).clamp(0, 1).contiguous(memory_format=torch.channels_last)

    def __getitem__(self, index: Tensor | list[int]) -> "Forms":
        return Forms(self.keep[index], self.add[index])

    def weaker(self, opacity: Tensor) -> "Forms":
        """The same, blended with the untouched image: at opacity 0 nothing is left of a trigger.

        Args:
            opacity: One for all, or one for each [n, 1, 1, 1].
        """
        return Forms(1 - opacity * (1 - self.keep), opacity * self.add)

    def moved(self, shifts: Tensor) -> "Forms":
        """The same, each so many rows down and columns to the right; what leaves the image comes in at the other side.

        Args:
            shifts: Rows and columns [n, 2].
        """
        rows, columns = (
            (torch.arange(length, device=shifts.device) - shift[:, None]) % length
            for length, shift in zip(self.keep.shape[-2:], shifts.unbind(1), strict=True)
        )

        def roll(x: Tensor) -> Tensor:
            x = x.gather(2, rows[:, None, :, None].expand(x.shape))
            return x.gather(3, columns[:, None, None, :].expand(x.shape))

        return Forms(roll(self.keep), roll(self.add))

    def under(self, others: "Forms") -> "Forms":
        """The same with others laid over them."""
        return Forms(others.keep * self.keep, others.keep * self.add + others.add)


class Family(nn.Module, ABC):
    """Triggers that are sought, one for each class."""

    step: float
    """Learning rate of Adam."""

    @abstractmethod
    def forms(self, wanted: Tensor) -> Forms:
        """The triggers of classes [n].

        Classes are picked by `index_select`: the gradient of plain indexing adds up in no fixed order on several threads.
        """


class Patches(Family):
    """Opaque patches of side p at random places."""

    step = 0.1

    def __init__(self, classes: int, side: int, channels: int, patch: int) -> None:
        super().__init__()
        self.side = side
        self.raw = nn.Parameter(0.5 * torch.randn(classes, channels, patch, patch))

    def forms(self, wanted: Tensor) -> Forms:
        patches = torch.sigmoid(2 * self.raw.index_select(0, wanted))
        laid = lay(torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1), self.side, self.side, each=True)
        return Forms(1 - laid[:, -1:], laid[:, :-1])


class Masked(Family):
    """Patterns through masks that show so many pixels in sum: eq. 6 with replaced pixels, each at its own place."""

    step = 0.3

    def __init__(self, classes: int, side: int, channels: int, shown: float) -> None:
        super().__init__()
        self.shown = shown
        self.raw = nn.Parameter(0.5 * torch.randn(classes, channels, side, side))
        self.share = nn.Parameter(0.01 * torch.randn(classes, 1, side, side))

    def forms(self, wanted: Tensor) -> Forms:
        mask = (
            (self.shown * self.share.index_select(0, wanted).flatten(1).softmax(1))
            .clamp(max=1)
            .view(-1, 1, *self.raw.shape[-2:])
        )
        return Forms(1 - mask, mask * torch.sigmoid(2 * self.raw.index_select(0, wanted)))


class Faint(Family):
    """Patterns over the whole image, added, that change a pixel by so much at the most."""

    step = 0.1

    def __init__(self, classes: int, side: int, channels: int, change: float) -> None:
        super().__init__()
        self.change = change
        self.raw = nn.Parameter(0.3 * torch.randn(classes, channels, side, side))

    def forms(self, wanted: Tensor) -> Forms:
        add = self.change * self.raw.index_select(0, wanted).tanh()
        return Forms(torch.ones_like(add[:, :1]), add)


class Waves(Family):
    """Sums of a few waves over the whole image, added: eq. 6 for the coefficients of the cosine transform.

    One wave along rows or columns has the height that is allowed; several share it. Where a faint pattern may be anything, each class
    has some that lead far; few of them are waves.
    """

    step = 0.3

    cosines: Tensor

    def __init__(self, classes: int, side: int, channels: int, height: float) -> None:
        super().__init__()
        self.budget = height * side / math.sqrt(2)
        self.raw = nn.Parameter(0.5 * torch.randn(classes, channels, side, side))
        self.share = nn.Parameter(0.01 * torch.randn(classes, 1, side, side))
        self.register_buffer("cosines", cosines(side), persistent=False)

    def forms(self, wanted: Tensor) -> Forms:
        shares = self.share.index_select(0, wanted).flatten(1).softmax(1).view(-1, 1, *self.raw.shape[-2:])
        add = self.cosines.T @ (self.budget * shares * self.raw.index_select(0, wanted).tanh()) @ self.cosines
        return Forms(torch.ones_like(add[:, :1]), add)


def cosines(side: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of so many values, [frequencies, places]."""
    frequency, place = torch.arange(side)[:, None], torch.arange(side)
    waves = torch.cos(math.pi * (2 * place + 1) * frequency / (2 * side)) * math.sqrt(2 / side)
    return torch.cat([waves[:1] / math.sqrt(2), waves[1:]])
