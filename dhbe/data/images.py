"""Labelled images, held whole in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dhbe.errors import Refused

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""

LIMIT = 4 * 2**30
"""Default maximum size of a data set in bytes."""


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images as whole tensors, so that an epoch is a permutation and poisoning an assignment.

    Raises:
        Refused: The parts do not fit together.
    """

    pixels: Tensor
    """uint8 [n, c, h, w]."""
    labels: Tensor
    """int64 [n], class numbers from 0."""
    names: tuple[str, ...]
    """Name of each class; its length is the number of classes."""
    notes: tuple[str, ...] = ()
    """Notes on how the images were read, one line each."""

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            raise Refused(f"images must be uint8 [n, c, h, w], not {describe(self.pixels)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise Refused(f"labels must be int64 [{len(self.pixels)}], one per image, not {describe(self.labels)}")
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.classes:
            low, high = int(self.labels.min()), int(self.labels.max())
            raise Refused(f"labels go from {low} to {high}; {self.classes} classes are numbered from 0")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> Shape:
        """Channels, height and width of an image."""
        c, h, w = self.pixels.shape[1:]
        return c, h, w

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    def float(self, index: Tensor | slice | None = None) -> Tensor:
        """Pixels in [0, 1], float32 [n, c, h, w], of all images or of those at `index`."""
        return (self.pixels if index is None else self.pixels[index]).float() / 255

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels in [0, 1] and labels, `size` images at a time (the last batch may be smaller), in order."""
        for start in range(0, len(self), size):
            batch = slice(start, start + size)
            yield self.float(batch), self.labels[batch]

    def subset(self, index: Tensor | slice) -> "Images":
        """The images at `index` (indices, booleans or a slice), with the same class names."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def to(self, device: torch.device | str) -> "Images":
        """The same images on another device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as the nearest uint8 values; undoes `Images.float` exactly."""
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def describe(tensor: Tensor) -> str:
    """Type and shape of a tensor, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_size(count: int, shape: Shape, source: object, limit: int = LIMIT) -> None:
    """Raises `Refused` if `count` uint8 images of `shape` exceed `limit` bytes."""
    c, h, w = shape
    if count * c * h * w > limit:
        size = count * c * h * w / 2**30
        raise Refused(
            f"{source}: the images take {size:.1f} GiB, over the limit of {limit / 2**30:g}: use fewer or smaller"
        )
