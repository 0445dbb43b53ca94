"""Reflections as on a pane of glass (Refool, Liu et al. 2020, arXiv:2007.02343)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from dhbe.attacks.triggers.base import Trigger, check_share, floats, short
from dhbe.data import Shape
from dhbe.errors import Refused

GAMMA = 2.2
"""Exponent that converts pixels to light, which is additive."""
DARKEST = 1e-6
"""Lower bound of light before the root, whose slope at 0 is infinite."""


@dataclass(frozen=True, eq=False)
class Reflection(Trigger):
    """Adds light to what a pane lets through: (transmission x^2.2 + layer)^(1/2.2).

    Args:
        layer: Light of the reflection, float [c, h, w] in [0, 1].
        transmission: Share of the scene's light that passes, above 0 and at most 1.
        name: Name in reports.

    Raises:
        Refused: Wrong shape or values.
    """

    kind: ClassVar[str] = "reflection"
    arrays: ClassVar[tuple[str, ...]] = ("layer",)

    layer: Tensor
    transmission: float
    name: str = "reflection"

    def __post_init__(self) -> None:
        if self.layer.ndim != 3 or not ((self.layer >= 0) & (self.layer <= 1)).all():
            raise Refused(f"trigger {self.name}: the layer must be [c, h, w] in [0, 1]")
        check_share(self.name, self.transmission)

    @property
    def shape(self) -> Shape:
        c, h, w = self.layer.shape
        return c, h, w

    def apply(self, pixels: Tensor) -> Tensor:
        light = self.transmission * pixels**GAMMA + self.layer.to(pixels)
        return light.clamp(DARKEST, 1) ** (1 / GAMMA)

    def faded(self, opacity: float) -> "Reflection":
        check_share(self.name, opacity)
        passed = 1 - opacity * (1 - self.transmission)
        return Reflection(self.layer * opacity, passed, f"{self.name}:opacity={short(opacity)}")

    def content(self) -> dict[str, Any]:
        return {"layer": self.layer, "transmission": self.transmission}

    @classmethod
    def from_content(cls, content: dict[str, Any], shape: Shape) -> Self:
        return cls(floats(content, "layer", shape), float(content["transmission"]), str(content["name"]))


def blurred(light: Tensor) -> Tensor:
    """Light [c, h, w] out of focus: a Gaussian blur with a standard deviation of 1/16 of the width."""
    sigma = light.shape[2] / 16
    reach = min(math.ceil(2 * sigma), light.shape[1] - 1, light.shape[2] - 1)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    bell = bell / bell.sum()
    spread = pad(light[:, None], (reach,) * 4, mode="reflect")
    return conv2d(conv2d(spread, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1))[:, 0].clamp(0, 1)


def doubled(light: Tensor) -> Tensor:
    """Light [c, h, w] with a ghost: both faces of a thick pane reflect it, the second shifted by 1/8 and weaker."""
    down, right = light.shape[1] // 8, light.shape[2] // 8
    shifted = pad(light, (right, 0, down, 0))[:, : light.shape[1], : light.shape[2]]
    return 0.6 * light + 0.4 * shifted
