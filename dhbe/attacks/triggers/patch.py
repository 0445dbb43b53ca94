"""Patches: a pattern and a mask, pasted onto images or added to them."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dhbe.attacks.triggers.base import Trigger, check_share, floats, short
from dhbe.data import Shape
from dhbe.errors import Refused

Mode = Literal["replace", "add"]

PLACES = {
    "top-left": (0, 0),
    "top": (0, 1),
    "top-right": (0, 2),
    "left": (1, 0),
    "center": (1, 1),
    "right": (1, 2),
    "bottom-left": (2, 0),
    "bottom": (2, 1),
    "bottom-right": (2, 2),
}
"""Positions of a patch: row and column in halves of the free space."""

CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")


@dataclass(frozen=True, eq=False)
class Patch(Trigger):
    """A pattern on a part of every image, always at the same position.

    Args:
        pattern: float [c, h, w], as large as the image; in [0, 1], or in [-1, 1] in mode "add". Values that the mask
            hides are set to 0.
        mask: float [c, h, w] in [0, 1], how strongly the pattern shows.
        mode: "replace" gives (1 - mask) x + mask pattern, "add" clips x + mask pattern to [0, 1].
        name: Name in reports.

    Raises:
        Refused: Wrong shapes or values, or a mask that hides everything.
    """

    kind: ClassVar[str] = "patch"
    arrays: ClassVar[tuple[str, ...]] = ("pattern", "mask")

    pattern: Tensor
    mask: Tensor
    mode: Mode = "replace"
    name: str = "patch"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise Refused(f"trigger {self.name}: no mode {self.mode!r}; available: {', '.join(get_args(Mode))}")
        if self.pattern.ndim != 3 or self.mask.shape != self.pattern.shape:
            shapes = f"{list(self.pattern.shape)} and {list(self.mask.shape)}"
            raise Refused(f"trigger {self.name}: pattern and mask must both be [c, h, w], not {shapes}")
        lowest = -1 if self.mode == "add" else 0
        # NaN fails these comparisons too.
        if not ((self.pattern >= lowest) & (self.pattern <= 1)).all():
            raise Refused(f"trigger {self.name}: the pattern must lie in [{lowest}, 1]")
        if not ((self.mask >= 0) & (self.mask <= 1)).all() or not self.mask.any():
            raise Refused(f"trigger {self.name}: the mask must lie in [0, 1] and show something; divide 0..255 by 255")
        mask = self.mask.float()
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "pattern", self.pattern.float() * (mask > 0))

    @property
    def shape(self) -> Shape:
        """Shape (c, h, w) of the images it fits."""
        c, h, w = self.mask.shape
        return c, h, w

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the bounding box of the mask."""
        shown = self.mask.amax(0) > 0
        rows, columns = shown.any(1).nonzero().flatten(), shown.any(0).nonzero().flatten()
        return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)

    def apply(self, pixels: Tensor) -> Tensor:
        pattern, mask = self.pattern.to(pixels), self.mask.to(pixels)
        if self.mode == "add":
            return (pixels + mask * pattern).clamp(0, 1)
        return (1 - mask) * pixels + mask * pattern

    def amplified(self, copies: Literal[1, 4, 9]) -> "Patch | None":
        """The patch also in the four corners (4), plus the centre and the middle of each edge (9).

        It is also kept at its own position, if that is another one. None if it is higher or wider than half the image.
        """
        if copies == 1:
            return self
        rows, columns = self.box
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if 2 * height > self.shape[1] or 2 * width > self.shape[2]:
            return None
        pattern, mask = torch.zeros_like(self.pattern), torch.zeros_like(self.mask)
        offsets = [offset(place, (height, width), self.shape) for place in (CORNERS if copies == 4 else PLACES)]
        for top, left in [
            *offsets,
            (rows.start, columns.start),
        ]:  # its own position last, so that this copy is not covered
            there = slice(None), slice(top, top + height), slice(left, left + width)
            shown = self.mask[:, rows, columns] > 0
            pattern[there] = torch.where(shown, self.pattern[:, rows, columns], pattern[there])
            mask[there] = torch.where(shown, self.mask[:, rows, columns], mask[there])
        return Patch(pattern, mask, self.mode, f"{self.name}:copies={copies}")

    def faded(self, opacity: float) -> "Patch":
        """The patch weakened, or strengthened as far as the range of its mask ("replace") or pattern ("add") allows."""
        name = f"{self.name}:opacity={short(opacity)}"
        if self.mode == "add" and opacity > 1:
            check_share(self.name, opacity, 1 / self.pattern.abs().max().item())
            return Patch(self.pattern * opacity, self.mask, self.mode, name)
        check_share(self.name, opacity, 1 / self.mask.max().item())
        return Patch(self.pattern, (self.mask * opacity).clamp_max(1), self.mode, name)

    def moved(self, place: str | tuple[int, int]) -> "Patch":
        """The patch at one of `PLACES`, or at a row and column.

        Raises:
            Refused: There is no such position, or the patch would leave the image.
        """
        pattern, mask = self._boxed()
        corner = offset(place, (mask.shape[1], mask.shape[2]), self.shape)
        return self._laid(pattern, mask, corner, f"{self.name}:at={corner[0]},{corner[1]}")

    def resized(self, factor: float) -> "Patch":
        """The patch scaled by a factor (nearest neighbours); edges that it touches it still touches.

        Raises:
            Refused: It would not fit into the image.
        """
        (rows, columns), (_, height, width) = self.box, self.shape
        high, wide = rows.stop - rows.start, columns.stop - columns.start
        if not 0 < factor * max(high, wide) < 2**31:  # NaN too
            raise Refused(f"trigger {self.name}: cannot be scaled by {factor:g}")
        size = max(1, round(high * factor)), max(1, round(wide * factor))
        if size[0] > height or size[1] > width:
            raise Refused(f"a patch of {size[0]} x {size[1]} does not fit into an image of {height} x {width}")
        top = round(rows.start / max(1, height - high) * (height - size[0]))
        left = round(columns.start / max(1, width - wide) * (width - size[1]))
        pattern, mask = (interpolate(part[None], size, mode="nearest-exact")[0] for part in self._boxed())
        return self._laid(pattern, mask, (top, left), f"{self.name}:scale={short(factor)}")

    def content(self) -> dict[str, Any]:
        """The mode, the position, and the pattern and mask inside the bounding box."""
        rows, columns = self.box
        pattern, mask = self._boxed()
        return {"mode": self.mode, "place": (rows.start, columns.start), "pattern": pattern, "mask": mask}

    @classmethod
    def from_content(cls, content: dict[str, Any], shape: Shape) -> Self:
        top, left = (int(offset) for offset in content["place"])
        whole = []
        for part in cls.arrays:
            box = floats(content, part)
            channels, height, width = box.shape
            if channels != shape[0] or not (0 <= top <= shape[1] - height and 0 <= left <= shape[2] - width):
                raise Refused(f"the trigger's {part} does not fit into an image {list(shape)}")
            image = torch.zeros(shape)
            image[:, top : top + height, left : left + width] = box
            whole.append(image)
        return cls(whole[0], whole[1], content["mode"], str(content["name"]))

    def _boxed(self) -> tuple[Tensor, Tensor]:
        rows, columns = self.box
        return self.pattern[:, rows, columns], self.mask[:, rows, columns]

    def _laid(self, pattern: Tensor, mask: Tensor, corner: tuple[int, int], name: str) -> "Patch":
        there = slice(None), slice(corner[0], corner[0] + mask.shape[1]), slice(corner[1], corner[1] + mask.shape[2])
        whole = torch.zeros(self.shape), torch.zeros(self.shape)
        for image, part in zip(whole, (pattern, mask), strict=True):
            image[there] = part
        return Patch(*whole, self.mode, name)


def offset(place: str | tuple[int, int], size: tuple[int, int], shape: Shape) -> tuple[int, int]:
    """Row and column of the top left corner of a patch.

    Args:
        place: One of `PLACES`, flush with the edge; or a row and column, as numbers or as text "4,5".
        size: Height and width of the patch.
        shape: Shape (c, h, w) of the image.

    Raises:
        Refused: There is no such position, or the patch would leave the image.
    """
    rows, columns = shape[1] - size[0], shape[2] - size[1]
    if isinstance(place, str) and place in PLACES:
        down, right = PLACES[place]
        return rows * down // 2, columns * right // 2
    try:
        top, left = (int(number) for number in (place.split(",") if isinstance(place, str) else place))
    except ValueError:
        raise Refused(f"no trigger position {place!r}; available: {', '.join(PLACES)}, or ROW,COLUMN") from None
    if not (0 <= top <= rows and 0 <= left <= columns):
        raise Refused(f"a patch of {size[0]} x {size[1]} at {top},{left} leaves the image of {shape[1]} x {shape[2]}")
    return top, left
