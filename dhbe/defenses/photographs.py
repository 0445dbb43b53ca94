"""Pieces of two photographs that come with scikit-learn: images of the real world that are nobody's training data.

A teacher answers them surely and in many ways, and distillation on pieces of a single photograph is known to go far
(Asano and Saeed 2023, arXiv:2112.00725). They need no BatchNorm, and no trigger was ever laid on them.
"""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dhbe.data import Shape

FINENESS = 2**0.5
"""From one level of the pyramid to the next, the photographs shrink by this."""


def pieces(count: int, shape: Shape) -> Tensor:
    """Random pieces at all scales, mirrored and recoloured by chance.

    They are drawn from torch's generator on the CPU, whatever the default device.

    Args:
        count: How many.
        shape: Their shape (c, h, w); one channel gives grey.

    Returns:
        Pixels [count, c, h, w] in [0, 1].
    """
    with torch.device("cpu"):
        channels, height, width = shape
        levels = _pyramid(max(height, width))
        which = torch.randint(len(levels), (count,))
        drawn = torch.empty(count, 3, height, width)
        for number, level in enumerate(levels):
            places = (which == number).nonzero().flatten()
            if len(places):
                drawn[places] = _cut(level, len(places), height, width)
        flipped = torch.rand(count, 1, 1, 1) < 0.5
        drawn = torch.where(flipped, drawn.flip(3), drawn)
        order = torch.rand(count, 3).argsort(1)
        shuffled = drawn.gather(1, order[..., None, None].expand_as(drawn))
        drawn = torch.where(torch.rand(count, 1, 1, 1) < 0.5, shuffled, drawn)
        middle = drawn.mean((1, 2, 3), keepdim=True)
        contrast, tint = 0.6 + torch.rand(count, 1, 1, 1), 0.3 * torch.rand(count, 3, 1, 1) - 0.15
        drawn = ((drawn - middle) * contrast + middle + tint).clamp(0, 1)
        return drawn if channels == 3 else drawn.mean(1, keepdim=True).expand(-1, channels, -1, -1).contiguous()


@cache
def _pyramid(side: int) -> list[Tensor]:
    """Both photographs [2, 3, h, w] from full size down to where `side` pixels are their whole height."""
    from sklearn.datasets import load_sample_images

    photographs = torch.stack([torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images])
    photographs = photographs.float() / 255
    height, width = photographs.shape[-2:]
    steps = max(0, math.floor(math.log(height / side, FINENESS)))
    heights = [max(side, round(height / FINENESS**step)) for step in range(steps + 1)]
    return [
        F.interpolate(photographs, size=(h, max(side, round(width * h / height))), mode="bilinear", antialias=True)
        for h in heights
    ]


def _cut(photographs: Tensor, count: int, height: int, width: int) -> Tensor:
    """Pieces [count, 3, height, width] at random places of photographs [2, 3, h, w]."""
    which = torch.randint(len(photographs), (count, 1, 1))
    top = torch.randint(photographs.shape[2] - height + 1, (count, 1, 1))
    left = torch.randint(photographs.shape[3] - width + 1, (count, 1, 1))
    rows, columns = top + torch.arange(height).view(1, -1, 1), left + torch.arange(width).view(1, 1, -1)
    return photographs[which, :, rows, columns].permute(0, 3, 1, 2)
