"""A smooth, hardly visible warp of the image (WaNet, Nguyen and Tran 2021, arXiv:2102.10369)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from dhbe.attacks.triggers.base import Trigger, check_share, floats, short
from dhbe.data import Shape
from dhbe.errors import Refused

LARGEST_GRID = 1024


@dataclass(frozen=True, eq=False)
class Warp(Trigger):
    """Resamples every pixel from a slightly shifted position.

    The image's corners have the coordinates -1 and 1. Shifts at the control points are interpolated bicubically,
    multiplied by strength / height (rows) and strength / width (columns), added to the pixel's own coordinates and
    clamped to the image, which is then sampled bilinearly.

    Args:
        control: Shifts at the control points, float [2, k, k]: columns, then rows. WaNet's have mean absolute value 1.
        strength: WaNet's s.
        fits: Shape (c, h, w) of the images.
        name: Name in reports.

    Raises:
        Refused: Wrong shape or values.
    """

    kind: ClassVar[str] = "warp"
    arrays: ClassVar[tuple[str, ...]] = ("control",)

    control: Tensor
    strength: float
    fits: Shape
    name: str = "warp"

    def __post_init__(self) -> None:
        size = self.control.shape
        if len(size) != 3 or size[0] != 2 or size[1] != size[2] or not 2 <= size[1] <= LARGEST_GRID:
            raise Refused(
                f"trigger {self.name}: control points must be [2, k, k] with k of 2 or more, not {list(size)}"
            )
        if not (self.control.isfinite().all() and abs(self.strength) < float("inf")):
            raise Refused(f"trigger {self.name}: shifts and strength must be finite")

    @property
    def shape(self) -> Shape:
        """Shape (c, h, w) of the images it fits."""
        return self.fits

    @property
    def field(self) -> Tensor:
        """The sampling position of each pixel: float [h, w, 2], column and row in [-1, 1]."""
        _, height, width = self.shape
        shifts = interpolate(self.control[None], (height, width), mode="bicubic", align_corners=True)[0]
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        moved = [columns + self.strength / width * shifts[0], rows + self.strength / height * shifts[1]]
        return torch.stack(moved, 2).clamp(-1, 1)

    def apply(self, pixels: Tensor) -> Tensor:
        field = self.field.to(pixels).expand(len(pixels), -1, -1, -1)
        return grid_sample(pixels, field, mode="bilinear", padding_mode="border", align_corners=True).clamp(0, 1)

    def faded(self, opacity: float) -> "Warp":
        check_share(self.name, opacity, float("inf"))
        return Warp(self.control, self.strength * opacity, self.shape, f"{self.name}:opacity={short(opacity)}")

    def content(self) -> dict[str, Any]:
        return {"control": self.control, "strength": self.strength}

    @classmethod
    def from_content(cls, content: dict[str, Any], shape: Shape) -> Self:
        return cls(floats(content, "control"), float(content["strength"]), shape, str(content["name"]))
