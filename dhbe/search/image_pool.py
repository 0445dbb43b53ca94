"""The images that a student is trained on, with the teacher's logits."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.generators import NOISE
from dhbe.search.families import Overlay

AT_ONCE = 128
"""Images per forward pass of the teacher."""


class ImagePool(nn.Module):
    """Images with 8 bits per channel, like a camera's, with the teacher's logits.

    Args:
        size: Number of images.
        shape: Image shape (c, h, w).
        classes: Number of the teacher's classes.
        largest: Maximum size in bytes; with large images, the pool holds fewer than `size`.
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
        """Stores pixels [n, c, h, w] in [0, 1] from index `first` on, with the teacher's logits."""
        for part in pixels.split(AT_ONCE):
            place = slice(first, first + len(part))
            self.pixels[place] = (part * 255).round().to(torch.uint8)
            self.answers[place] = teacher(self._float(self.pixels[place]))
            first += len(part)

    @torch.no_grad()
    def renew(self, images: nn.Module, teacher: Classifier) -> None:
        """Replaces the first half with images of a generator."""
        half = len(self) // 2
        for first in range(0, half, AT_ONCE):
            self.fill(images(torch.randn(AT_ONCE, NOISE))[: half - first], teacher, first)

    @torch.no_grad()
    def filter(self, trigger: Overlay, wanted: int, teacher: Classifier) -> None:
        """Removes images that happen to show the trigger, whose logits would teach it back to the student.

        The trigger's region is replaced with that of another image. An image is removed if this costs class `wanted` more
        than half a standard deviation of all logits. The pool keeps its size by repetition.
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
        """Draws images [n, c, h, w] in [0, 1] and their logits [n, classes], with replacement.

        Args:
            count: Number of images n.
            evenly: Draw each predicted class with equal probability.
        """
        if evenly:
            labels = self.answers.argmax(1)
            each = torch.zeros(self.answers.shape[1]).scatter_add_(0, labels, torch.ones(len(self)))
            place = torch.multinomial(1 / each[labels], count, replacement=True)
        else:
            place = torch.randint(len(self), (count,))
        return self._float(self.pixels[place]), self.answers[place]

    def same(self, count: int) -> tuple[Tensor, Tensor]:
        """Images and logits as from `sample`, but evenly spaced over the pool and the same at each call."""
        place = torch.arange(count) * len(self) // count
        return self._float(self.pixels[place]), self.answers[place]

    @staticmethod
    def _float(pixels: Tensor) -> Tensor:
        return (pixels.float() / 255).contiguous(memory_format=torch.channels_last)
