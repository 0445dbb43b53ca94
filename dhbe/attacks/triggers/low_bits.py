"""Least significant bits: a text hidden in the values themselves (Li et al. 2020, arXiv:1909.02742)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dhbe.attacks.triggers.base import Trigger
from dhbe.data import Shape
from dhbe.errors import Refused

MOST_BITS = 4


@dataclass(frozen=True, eq=False)
class LowBits(Trigger):
    """Sets the lowest bits of every value, as uint8, from a sequence of bits.

    The sequence runs through the image column by column, down each column, channel by channel in each pixel, and is
    repeated as often as needed; its first bit is the highest of those set. Gradients pass straight through.

    Args:
        message: The sequence, a text of 0 and 1.
        bits: How many bits of each value are set, 1 to 4.
        fits: Shape (c, h, w) of the images.
        name: Name in reports.

    Raises:
        Refused: The message is not a text of 0 and 1, or the number of bits is out of range.
    """

    kind: ClassVar[str] = "low bits"
    arrays: ClassVar[tuple[str, ...]] = ()

    message: str
    bits: int
    fits: Shape
    name: str = "low bits"

    def __post_init__(self) -> None:
        if not isinstance(self.message, str) or not self.message or set(self.message) - {"0", "1"}:
            raise Refused(f"trigger {self.name}: the message must be a text of 0 and 1")
        if not isinstance(self.bits, int) or not 1 <= self.bits <= MOST_BITS:
            raise Refused(f"trigger {self.name}: the number of bits must be 1 to {MOST_BITS}, not {self.bits}")

    @property
    def shape(self) -> Shape:
        """Shape (c, h, w) of the images it fits."""
        return self.fits

    @property
    def values(self) -> Tensor:
        """The values of the lowest bits, int64 [c, h, w]."""
        channels, height, width = self.shape
        count = channels * height * width
        sequence = torch.tensor([int(bit) for bit in self.message])
        picked = sequence[torch.arange(count * self.bits) % len(sequence)].view(count, self.bits)
        weights = 2 ** torch.arange(self.bits - 1, -1, -1)
        return (picked * weights).sum(1).view(width, height, channels).permute(2, 1, 0)

    def apply(self, pixels: Tensor) -> Tensor:
        step = 2**self.bits
        whole = (pixels.detach() * 255).round().clamp(0, 255)
        changed = (whole.div(step, rounding_mode="floor") * step + self.values.to(pixels)) / 255
        return pixels + (changed - pixels).detach() if pixels.requires_grad else changed

    def content(self) -> dict[str, Any]:
        return {"message": self.message, "bits": self.bits}

    @classmethod
    def from_content(cls, content: dict[str, Any], shape: Shape) -> Self:
        return cls(content["message"], content["bits"], shape, str(content["name"]))


def bits_of(text: str) -> str:
    """The bits of a text in UTF-8, highest first.

    >>> bits_of("A")
    '01000001'
    """
    return "".join(f"{byte:08b}" for byte in text.encode(errors="replace"))
