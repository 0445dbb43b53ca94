"""The two generators of the paper (appendix B.2, tables 10 to 13): images, and the triggers laid on them.

`ImageGenerator` generates normalised images (zero mean, unit variance per channel), `TriggerGenerator` patches in (-1, 1).
Both start from a small map of 64 or 128 channels and double its size repeatedly: nearest-neighbour x2, 3 x 3 convolution,
BatchNorm, LeakyReLU(0.2).
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.data import Shape
from dhbe.errors import Refused

NOISE = 256
"""Length of the noise vector z ~ N(0, I)."""

SLOPE = 0.2

SMALLEST_SIDE = 8
"""Smallest image side in pixels for which the generators double at all."""


class Doubling(nn.Conv2d):
    """Nearest-neighbour x2 followed by a 3 x 3 convolution, as one transposed convolution.

    Repeating each pixel twice and convolving with a 3 x 3 kernel equals a transposed convolution of stride 2 whose
    4 x 4 kernel is the 3 x 3 one convolved with a 2 x 2 box: 16 multiplications per input pixel instead of 36.
    The parameters are those of the 3 x 3 convolution.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """Features [n, channels_in, h, w] to [n, channels_out, 2 h, 2 w]."""
        out, into = self.weight.shape[:2]
        # A transposed convolution applies the kernel flipped.
        box = F.pad(self.weight.flip(2, 3), (1, 1, 1, 1))
        kernel = box[..., :-1, :-1] + box[..., :-1, 1:] + box[..., 1:, :-1] + box[..., 1:, 1:]
        kernel = kernel.transpose(0, 1).contiguous(memory_format=torch.channels_last)
        assert kernel.shape == (into, out, 4, 4)
        return F.conv_transpose2d(input, kernel, self.bias, stride=2, padding=1)


def start(side: int, largest: int) -> tuple[int, int]:
    """The initial side, at most `largest`, and the number of doublings that reach at least `side` pixels.

    >>> start(32, 8), start(28, 8), start(64, 8), start(30, 8)
    ((8, 2), (7, 2), (8, 3), (8, 2))
    """
    doublings = 0
    while -(-side // 2**doublings) > largest:
        doublings += 1
    return -(-side // 2**doublings), doublings


class ImageGenerator(nn.Module):
    """G of the paper: noise to normalised images (table 13).

    Args:
        side: Height and width of the images in pixels, at least 8. The generator doubles from 5, 6, 7 or 8 px; a side that
            it cannot reach is resized bilinearly from the next larger one.
        channels: Channels of the images.
    """

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        self.side = side
        self.first, doublings = start(side, 8)
        self.project = nn.Linear(NOISE, 128 * self.first**2)
        self.norm = nn.BatchNorm2d(128)
        widths = [128, *(128 if i < doublings - 1 else 64 for i in range(doublings))]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(Doubling(a, b), nn.BatchNorm2d(b), nn.LeakyReLU(SLOPE, inplace=True))
                for a, b in pairwise(widths)
            )
        )
        self.to_image = nn.Conv2d(widths[-1], channels, kernel_size=3, padding=1)
        self.standardise = nn.BatchNorm2d(channels, affine=False)

    def forward(self, noise: Tensor) -> Tensor:
        """Noise [n, 256] to normalised images [n, channels, side, side]."""
        x = self.project(noise).view(-1, 128, self.first, self.first)
        x = self.norm(x.contiguous(memory_format=torch.channels_last))
        x = torch.tanh(self.to_image(self.blocks(x)))
        if x.shape[-1] != self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        return self.standardise(x)


class PixelGenerator(ImageGenerator):
    """An `ImageGenerator` of pixels in (0, 1), with a learned brightness and contrast per channel.

    It needs no normalisation constants, and never leaves the valid range of pixels.
    """

    def __init__(self, side: int, channels: int) -> None:
        super().__init__(side, channels)
        # At first the mean is 0.5 and the standard deviation about 0.23, as in many photographs.
        self.contrast = nn.Parameter(torch.full((1, channels, 1, 1), 1.1))
        self.brightness = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, noise: Tensor) -> Tensor:
        """Noise [n, 256] to pixels [n, channels, side, side] in (0, 1)."""
        return torch.sigmoid(self.contrast * super().forward(noise) + self.brightness)


class TriggerGenerator(nn.Module):
    """R of the paper: noise to patches in (-1, 1) (tables 10 to 12).

    Args:
        side: Height and width of the patches in pixels, at least 1. Up to 9 px they are made at full size; larger ones
            double from 5 to 9 px.
        channels: Channels of the images that the patches are laid on.
    """

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        self.side = side
        self.first, doublings = start(side, 9)
        self.project = nn.Linear(NOISE, 64 * self.first**2)
        self.norm = nn.BatchNorm2d(64)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(Doubling(64, 64), nn.BatchNorm2d(64), nn.LeakyReLU(SLOPE, inplace=True))
                for _ in range(doublings)
            )
        )
        self.to_patch = nn.Conv2d(64, channels, kernel_size=3, padding=1)
        self.standardise = nn.BatchNorm2d(channels, affine=False)

    def forward(self, noise: Tensor) -> Tensor:
        """Noise [n, 256] to patches [n, channels, side, side] in (-1, 1)."""
        x = self.project(noise).view(-1, 64, self.first, self.first)
        x = self.to_patch(self.blocks(self.norm(x)))
        if x.shape[-1] != self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        return torch.tanh(self.standardise(x))


def check_generated(shape: Shape) -> None:
    """Checks that the generators can make images of a shape (channels, height, width).

    Raises:
        Refused: It is not square, too small, or has neither 1 nor 3 channels.
    """
    channels, height, width = shape
    if height != width or height < SMALLEST_SIDE or channels not in (1, 3):
        raise Refused(
            f"--input={channels}x{height}x{width}: generated images must be square, of {SMALLEST_SIDE} px or more, "
            "with 1 or 3 channels"
        )


def check_patch(side: int, shape: Shape) -> None:
    """Checks that patches of a side in pixels fit into images of a shape (channels, height, width).

    Raises:
        Refused: They do not; the message states the valid sides.
    """
    most = min(shape[1:])
    if not 1 <= side <= most:
        raise Refused(f"--patch {side}: a trigger must have 1 to {most} px to fit into the images")
