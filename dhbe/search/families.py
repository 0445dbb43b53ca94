"""Triggers without data (the maximum over R of eq. 8): what they do to images, and the families in which they are sought.

Six families cover the field: patches at any place, patterns through a mask of a few pixels at their own place (a
network that flattens its features answers nowhere else), of two sizes, squares cut from images deep inside a class, and
over the whole image faint patterns and a few waves. To add one, write its class, name its bounds in `Bounds`, and list it in `FAMILIES`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Self

import torch
from torch import Tensor, nn

from dhbe.data import Shape
from dhbe.generators import check_patch
from dhbe.settings import Setting
from dhbe.steps import lay

UNIT = 32
"""Side of the images for which sides of squares are given, in pixels; larger images have larger ones."""


class Triggers(ABC):
    """Triggers [n] of one form. A form is a frozen dataclass; each of its fields is a tensor [n, ...]."""

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """Triggered copies of pixels [n, c, h, w] in [0, 1], each with its own trigger."""

    @abstractmethod
    def weaker(self, opacity: Tensor) -> Self:
        """The same, blended with the untouched image: at opacity 0 nothing is left of a trigger.

        Args:
            opacity: One for all, or one for each [n, 1, 1, 1].
        """

    @abstractmethod
    def moved(self, shifts: Tensor) -> Self:
        """The same, each so many rows down and columns to the right; what leaves the image comes in at the other side.

        Args:
            shifts: Rows and columns [n, 2].
        """

    @abstractmethod
    def under(self, others: Self) -> Self:
        """The same with others laid over them."""

    @property
    @abstractmethod
    def area(self) -> Tensor:
        """The share of an image that each covers [n]; 0 for one that covers nothing, but changes the whole image."""

    def __getitem__(self, index: Tensor | list[int]) -> Self:
        return type(self)(**{each.name: getattr(self, each.name)[index] for each in fields(self)})  # pyright: ignore[reportArgumentType]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """All triggers of some batches, one after the other."""
        return cls(**{each.name: torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)})  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False)
class Overlay(Triggers):
    """``clip(keep * x + add)``: a patch keeps nothing where it lies and adds itself, a faint pattern keeps everything."""

    keep: Tensor
    """What is kept of an image [n, 1, h, w], in [0, 1]."""
    add: Tensor
    """What is added [n, c, h, w]."""

    def __call__(self, pixels: Tensor) -> Tensor:
        return (self.keep * pixels + self.add).clamp(0, 1).contiguous(memory_format=torch.channels_last)

    def weaker(self, opacity: Tensor) -> "Overlay":
        return Overlay(1 - opacity * (1 - self.keep), opacity * self.add)

    def moved(self, shifts: Tensor) -> "Overlay":
        rows, columns = (
            (torch.arange(length, device=shifts.device) - shift[:, None]) % length
            for length, shift in zip(self.keep.shape[-2:], shifts.unbind(1), strict=True)
        )

        def roll(x: Tensor) -> Tensor:
            x = x.gather(2, rows[:, None, :, None].expand(x.shape))
            return x.gather(3, columns[:, None, None, :].expand(x.shape))

        return Overlay(roll(self.keep), roll(self.add))

    def under(self, others: Self) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self)(others.keep * self.keep, others.keep * self.add + others.add)

    @property
    def area(self) -> Tensor:
        return (1 - self.keep).mean((1, 2, 3))


@dataclass(frozen=True)
class Bounds:
    """How much of an image the triggers of each family may change (delta of eq. 6)."""

    patch: Annotated[int, Setting("side of a patch in pixels (p)", least=1)] = 5
    mask_area: Annotated[
        float, Setting("share of the pixels that a mask may show; a second family has half of it", most=1)
    ] = 0.025
    least_mask: Annotated[int, Setting("pixels that it may show in the smallest of images", least=1)] = 12
    epsilon: Annotated[float, Setting("largest change of a pixel by a faint pattern, of 1", most=1)] = 16 / 255
    excerpt: Annotated[
        int, Setting("side of the squares cut from images deep inside a class, in pixels of a 32 px image", least=1)
    ] = 5
    wave: Annotated[float, Setting("largest height of one wave over the whole image, of 1", most=1)] = 28 / 255

    def mask_pixels(self, shape: Shape) -> float:
        """How many pixels a mask may show in images of a shape."""
        return max(self.mask_area * shape[1] ** 2, self.least_mask)

    def check(self, shape: Shape) -> None:
        """Refuses patches that do not fit into images of a shape."""
        check_patch(self.patch, shape)


class Family(nn.Module, ABC):
    """Triggers that are sought, one for each class.

    Args:
        aims: How many triggers.
        shape: Of the images.
        bounds: How far they may go.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """What its triggers are, for whoever reads a report."""
    local: ClassVar[bool]
    """Its triggers lie at a place, and not over the whole image."""
    accuses: ClassVar[bool]
    """What stands out of it accuses a model."""
    compact: ClassVar[bool] = False
    """Its triggers spread over what an attacker may have stamped as a square, so squares are tried in their place."""
    sought: ClassVar[bool] = True
    """Its triggers are sought by gradient from the beginning."""
    lr: ClassVar[float]
    """Learning rate of Adam."""

    @abstractmethod
    def __init__(self, aims: int, shape: Shape, bounds: Bounds) -> None:
        super().__init__()

    @abstractmethod
    def triggers(self, wanted: Tensor) -> Overlay:
        """The triggers of classes [n].

        Classes are picked by `index_select`: the gradient of plain indexing adds up in no fixed order on several threads.
        """


class Patches(Family):
    """Opaque patches of side p at random places."""

    name, summary, local, accuses, lr = "patches", "a patch at any place", True, True, 0.1

    def __init__(self, aims: int, shape: Shape, bounds: Bounds) -> None:
        super().__init__(aims, shape, bounds)
        channels, self.side, _ = shape
        self.raw = nn.Parameter(0.5 * torch.randn(aims, channels, bounds.patch, bounds.patch))

    def triggers(self, wanted: Tensor) -> Overlay:
        patches = torch.sigmoid(2 * self.raw.index_select(0, wanted))
        laid = lay(torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1), self.side, self.side, each=True)
        return Overlay(1 - laid[:, -1:], laid[:, :-1])


class Masked(Family):
    """Patterns through masks that show so many pixels in sum: eq. 6 with replaced pixels, each at its own place."""

    name, summary, local, accuses, compact, lr = "masked", "a few pixels at one place", True, True, True, 0.3
    share: ClassVar[float] = 1.0
    """Of the pixels that a mask may show."""

    def __init__(self, aims: int, shape: Shape, bounds: Bounds) -> None:
        super().__init__(aims, shape, bounds)
        channels, side, _ = shape
        self.pixels = self.share * bounds.mask_pixels(shape)
        self.raw = nn.Parameter(0.5 * torch.randn(aims, channels, side, side))
        self.weights = nn.Parameter(0.01 * torch.randn(aims, 1, side, side))

    def triggers(self, wanted: Tensor) -> Overlay:
        shares = self.weights.index_select(0, wanted).flatten(1).softmax(1)
        mask = (self.pixels * shares).clamp(max=1).view(-1, 1, *self.raw.shape[-2:])
        return Overlay(1 - mask, mask * torch.sigmoid(2 * self.raw.index_select(0, wanted)))


class MaskedHalf(Masked):
    """The same with half as many pixels."""

    name, summary, share = "masked_half", "fewer pixels at one place", 0.5


class Excerpts(Family):
    """Opaque squares, each at its own place, cut from images deep inside its class (`excerpts.Excerpting.cut`)."""

    name, summary, local, accuses, lr = "excerpts", "a square cut from an image deep inside its class", True, True, 0.1
    sought = False

    mask: Tensor

    def __init__(self, aims: int, shape: Shape, bounds: Bounds) -> None:
        super().__init__(aims, shape, bounds)
        self.side = min(bounds.excerpt * max(1, round(shape[1] / UNIT)), *shape[1:])
        self.raw = nn.Parameter(torch.zeros(aims, *shape))
        self.register_buffer("mask", torch.zeros(aims, 1, *shape[1:]))

    def triggers(self, wanted: Tensor) -> Overlay:
        mask = self.mask.index_select(0, wanted)
        return Overlay(1 - mask, mask * torch.sigmoid(2 * self.raw.index_select(0, wanted)))

    @torch.no_grad()
    def take(self, trigger: Overlay, label: int) -> None:
        """Takes one square over, as the trigger of a class."""
        self.mask[label] = 1 - trigger.keep[0]
        self.raw[label] = trigger.add[0].clamp(0.02, 0.98).logit() / 2


class Faint(Family):
    """Patterns over the whole image, added, that change a pixel by so much at the most."""

    name, summary, local, accuses, lr = "faint", "a faint pattern over the whole image", False, True, 0.1

    def __init__(self, aims: int, shape: Shape, bounds: Bounds) -> None:
        super().__init__(aims, shape, bounds)
        self.epsilon = bounds.epsilon
        self.raw = nn.Parameter(0.3 * torch.randn(aims, *shape))

    def triggers(self, wanted: Tensor) -> Overlay:
        add = self.epsilon * self.raw.index_select(0, wanted).tanh()
        return Overlay(torch.ones_like(add[:, :1]), add)


class Waves(Family):
    """Sums of a few waves over the whole image, added: eq. 6 for the coefficients of the cosine transform.

    One wave along rows or columns has the height that is allowed; several share it. Where a faint pattern may be anything, each
    class has some that lead far; few of them are waves. They do not accuse: many a clean class has a wave of its own, and
    while a student may learn to ignore it at little cost, an accusation must not rest on it.
    """

    name, summary, local, accuses, lr = "waves", "a few waves over the whole image", False, False, 0.3

    cosines: Tensor

    def __init__(self, aims: int, shape: Shape, bounds: Bounds) -> None:
        super().__init__(aims, shape, bounds)
        channels, side, _ = shape
        self.budget = bounds.wave * side / math.sqrt(2)
        self.raw = nn.Parameter(0.5 * torch.randn(aims, channels, side, side))
        self.weights = nn.Parameter(0.01 * torch.randn(aims, 1, side, side))
        self.register_buffer("cosines", cosines(side), persistent=False)

    def triggers(self, wanted: Tensor) -> Overlay:
        shares = self.weights.index_select(0, wanted).flatten(1).softmax(1).view(-1, 1, *self.raw.shape[-2:])
        add = self.cosines.T @ (self.budget * shares * self.raw.index_select(0, wanted).tanh()) @ self.cosines
        return Overlay(torch.ones_like(add[:, :1]), add)


FAMILIES: tuple[type[Family], ...] = (Patches, Masked, MaskedHalf, Excerpts, Faint, Waves)
"""All that are sought, in this order."""

SENTENCES = {family.name: family.summary for family in FAMILIES}
"""What each is, by its name, for a record: whoever draws a report from it need not know the families."""


def cosines(side: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of so many values, [frequencies, places]."""
    frequency, place = torch.arange(side)[:, None], torch.arange(side)
    waves = torch.cos(math.pi * (2 * place + 1) * frequency / (2 * side)) * math.sqrt(2 / side)
    return torch.cat([waves[:1] / math.sqrt(2), waves[1:]])
