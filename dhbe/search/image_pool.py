"""The images that a student is shown, with the teacher's answers."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.generators import NOISE
from dhbe.search.families import Overlay

AT_ONCE = 128
"""Images that the teacher answers at a time."""


class ImagePool(nn.Module):
    """Images in 8 bits, as a camera would deliver them, with the teacher's answers.

    Args:
        size: How many.
        shape: Their shape (c, h, w).
        classes: Of the teacher.
        largest: Bytes that they may take; of large images there are fewer.
    """

    pixels: Tensor
    """uint8 [size, c, h, w]."""
    answers: Tensor
    """Logits [size, classes]."""

    def __init__(self, size: int, shape: Shape, classes: int, largest: int = 2**28) -> None:
        super().__init__()
        size = max(1, min(size, largest // math.prod(shape)))
        self.register_buffer("pixels", torch.zeros(size, *shape, dtype=torch.uint8))
        self.register_buffer("answers", torch.zeros(size, classes))

    def __len__(self) -> int:
        return len(self.pixels)

    @torch.no_grad()
    def fill(self, pixels: Tensor, teacher: Classifier, first: int = 0) -> None:
        """Takes images in from place `first` on, with the answers of the teacher."""
        for part in pixels.split(AT_ONCE):
            place = slice(first, first + len(part))
            self.pixels[place] = (part * 255).round().to(torch.uint8)
            self.answers[place] = teacher(self._float(self.pixels[place]))
            first += len(part)

    @torch.no_grad()
    def renew(self, images: nn.Module, teacher: Classifier) -> None:
        """Replaces the first half by images of a generator."""
        half = len(self) // 2
        for first in range(0, half, AT_ONCE):
            self.fill(images(torch.randn(AT_ONCE, NOISE))[: half - first], teacher, first)

    @torch.no_grad()
    def filter(self, trigger: Overlay, wanted: int, teacher: Classifier) -> None:
        """Leaves out images that show the trigger by themselves, whose answers would teach it back.

        Where a trigger lies another image is put in; a margin of `wanted` that goes with it was the trigger's.
        """
        region = F.max_pool2d((trigger.keep < 0.7).float(), 3, stride=1, padding=1)
        if not 0 < region.mean() < 0.25:
            return
        tolerance, good = self.answers.std() / 2, []
        for place in torch.arange(len(self)).split(AT_ONCE):
            pixels = self._float(self.pixels[place])
            other = self._float(self.pixels[(place + len(self) // 3) % len(self)])
            swapped = teacher(pixels * (1 - region) + other * region)
            good.append((self.answers[place] - swapped)[:, wanted] < tolerance)
        left = torch.cat(good).nonzero().flatten()
        if len(left) >= len(self) // 4:
            again = left[torch.arange(len(self)) % len(left)]
            self.pixels, self.answers = self.pixels[again], self.answers[again]

    def sample(self, count: int, *, evenly: bool = False) -> tuple[Tensor, Tensor]:
        """Images [n, c, h, w] in [0, 1] and answers [n, classes], with repetition; `evenly`, as many of each class."""
        if evenly:
            labels = self.answers.argmax(1)
            each = torch.zeros(self.answers.shape[1]).scatter_add_(0, labels, torch.ones(len(self)))
            place = torch.multinomial(1 / each[labels], count, replacement=True)
        else:
            place = torch.randint(len(self), (count,))
        return self._float(self.pixels[place]), self.answers[place]

    def same(self, count: int) -> tuple[Tensor, Tensor]:
        """Images and answers like those of `sample`, from all over the pool, the same ones at each call."""
        place = torch.arange(count) * len(self) // count
        return self._float(self.pixels[place]), self.answers[place]

    @staticmethod
    def _float(pixels: Tensor) -> Tensor:
        return (pixels.float() / 255).contiguous(memory_format=torch.channels_last)
