"""Triggers for data-free inversion (the maximum over R of eq. 8): their effect on images, and the families searched.

There are six families: patches at any position; patterns with a mask of a few pixels at a fixed position, in two sizes (a
network that flattens its features responds at no other position); squares cut from deep (maximum-margin) images; and, over
the whole image, faint patterns and a few waves. To add one, write its class, add its bounds to `Bounds` and list it in
`FAMILIES`.
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
"""Reference image side in pixels, for which sides of squares are given; they scale with the image."""


class Triggers(ABC):
    """A batch of n triggers of one form. A form is a frozen dataclass whose fields are tensors [n, ...]."""

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """Triggered copies of pixels [n, c, h, w] in [0, 1], each with its own trigger."""

    @abstractmethod
    def weaker(self, opacity: Tensor) -> Self:
        """The triggers blended with the clean image; at opacity 0 nothing of a trigger is left.

        Args:
            opacity: In [0, 1]; a scalar, or one for each trigger [n, 1, 1, 1].
        """

    @abstractmethod
    def moved(self, shifts: Tensor) -> Self:
        """The triggers shifted cyclically.

        Args:
            shifts: Rows down and columns to the right, int64 [n, 2].
        """

    @abstractmethod
    def under(self, others: Self) -> Self:
        """The triggers with `others` laid over them."""

    @property
    @abstractmethod
    def area(self) -> Tensor:
        """The share of an image that each trigger covers [n], in [0, 1]; 0 for one that is only added to the image."""

    def __getitem__(self, index: Tensor | list[int]) -> Self:
        return type(self)(**{each.name: getattr(self, each.name)[index] for each in fields(self)})  # pyright: ignore[reportArgumentType]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Concatenates batches of triggers."""
        return cls(**{each.name: torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)})  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False)
class Overlay(Triggers):
    """``clip(keep * x + add)``: a patch has keep 0 where it lies and adds itself, a faint pattern has keep 1 everywhere."""

    keep: Tensor
    """The share of the image that is kept [n, 1, h, w], in [0, 1]."""
    add: Tensor
    """What is added [n, c, h, w], in units of pixels in [0, 1]."""

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
        float, Setting("share of the pixels that a mask may show; a second family has half as many", most=1)
    ] = 0.025
    least_mask: Annotated[int, Setting("pixels that a mask may show at least, however small the image", least=1)] = 12
    epsilon: Annotated[
        float, Setting("largest change of a pixel by a faint pattern, pixels being in [0, 1]", most=1)
    ] = 16 / 255
    excerpt: Annotated[
        int, Setting("side of the squares cut from deep images, in pixels of a 32 px image", least=1)
    ] = 5
    wave: Annotated[
        float, Setting("largest amplitude of a single wave over the whole image, pixels being in [0, 1]", most=1)
    ] = 28 / 255

    def mask_pixels(self, shape: Shape) -> float:
        """The number of pixels that a mask may show in images of shape (c, h, w)."""
        return max(self.mask_area * shape[1] ** 2, self.least_mask)

    def check(self, shape: Shape) -> None:
        """Checks that patches fit into images of shape (c, h, w).

        Raises:
            Refused: They do not.
        """
        check_patch(self.patch, shape)


class Family(nn.Module, ABC):
    """Triggers under search, one for each class.

    Args:
        aims: Number of triggers.
        shape: Image shape (c, h, w).
        bounds: Bounds of the triggers.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """A description of its triggers for reports."""
    local: ClassVar[bool]
    """Whether its triggers are confined to a region of the image."""
    accuses: ClassVar[bool]
    """Whether an outlier of this family counts as evidence of a backdoor."""
    compact: ClassVar[bool] = False
    """Whether its triggers may be blurred versions of a stamped square, so that squares are tested as well."""
    sought: ClassVar[bool] = True
    """Whether its triggers are optimised by gradient from the first round."""
    lr: ClassVar[float]
    """Learning rate of Adam."""

    @abstractmethod
    def __init__(self, aims: int, shape: Shape, bounds: Bounds) -> None:
        super().__init__()

    @abstractmethod
    def triggers(self, wanted: Tensor) -> Overlay:
        """The triggers for classes `wanted` [n].

        Implementations use `index_select`: the gradient of plain indexing is not deterministic with several threads.
        """


class Patches(Family):
    """Opaque patches of side p at random positions."""

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
    """Patterns with soft masks of a fixed sum, at a fixed position: eq. 6 with replaced pixels."""

    name, summary, local, accuses, compact, lr = "masked", "a few pixels at one place", True, True, True, 0.3
    share: ClassVar[float] = 1.0
    """Share of `Bounds.mask_pixels` that the masks of this family show."""

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
    """`Masked` with half as many pixels."""

    name, summary, share = "masked_half", "fewer pixels at one place", 0.5


class Excerpts(Family):
    """Opaque squares at a fixed position, cut from deep images of their class (`excerpts.Excerpting.cut`)."""

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
        """Stores one square as the trigger of a class."""
        self.mask[label] = 1 - trigger.keep[0]
        self.raw[label] = trigger.add[0].clamp(0.02, 0.98).logit() / 2


class Faint(Family):
    """Additive patterns over the whole image that change a pixel by at most `epsilon`."""

    name, summary, local, accuses, lr = "faint", "a faint pattern over the whole image", False, True, 0.1

    def __init__(self, aims: int, shape: Shape, bounds: Bounds) -> None:
        super().__init__(aims, shape, bounds)
        self.epsilon = bounds.epsilon
        self.raw = nn.Parameter(0.3 * torch.randn(aims, *shape))

    def triggers(self, wanted: Tensor) -> Overlay:
        add = self.epsilon * self.raw.index_select(0, wanted).tanh()
        return Overlay(torch.ones_like(add[:, :1]), add)


class Waves(Family):
    """Additive sums of a few waves over the whole image: eq. 6 applied to the coefficients of the cosine transform.

    A single wave along rows or columns may have the full amplitude; several share it. For every class there are arbitrary
    faint patterns with a large margin, but few of them are waves. Waves do not accuse: many clean classes respond to a wave,
    which a student can learn to ignore at little cost, but which is no evidence of a backdoor.
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
"""All families, in the order of searches and results."""

SENTENCES = {family.name: family.summary for family in FAMILIES}
"""Description of each family by name, stored in records so that reports do not depend on this module."""


def cosines(side: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of `side` values, a matrix [frequencies, positions]."""
    frequency, place = torch.arange(side)[:, None], torch.arange(side)
    waves = torch.cos(math.pi * (2 * place + 1) * frequency / (2 * side)) * math.sqrt(2 / side)
    return torch.cat([waves[:1] / math.sqrt(2), waves[1:]])
