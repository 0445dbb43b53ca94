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


AT_ONCE = 256
"""Pieces that are cut and coloured at a time; what is drawn by chance does not depend on it."""


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
        corners = torch.empty(count, 3, 1, 1, dtype=torch.int64)
        for number, level in enumerate(levels):
            places = (which == number).nonzero().flatten()
            if len(places):
                corners[places] = _corners(level, len(places), height, width)
        flipped, order = torch.rand(count, 1, 1, 1) < 0.5, torch.rand(count, 3).argsort(1)
        shuffled = torch.rand(count, 1, 1, 1) < 0.5
        contrast, tint = 0.6 + torch.rand(count, 1, 1, 1), 0.3 * torch.rand(count, 3, 1, 1) - 0.15
        drawn = torch.empty(count, *shape)
        for some in torch.arange(count).split(AT_ONCE):
            cut = torch.empty(len(some), 3, height, width)
            for number, level in enumerate(levels):
                here = which[some] == number
                cut[here] = _cut(level, corners[some][here], height, width)
            cut = torch.where(flipped[some], cut.flip(3), cut)
            cut = torch.where(shuffled[some], cut.gather(1, order[some][..., None, None].expand_as(cut)), cut)
            middle = cut.mean((1, 2, 3), keepdim=True)
            cut = ((cut - middle) * contrast[some] + middle + tint[some]).clamp(0, 1)
            drawn[some] = cut if channels == 3 else cut.mean(1, keepdim=True)
        return drawn


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


def _corners(photographs: Tensor, count: int, height: int, width: int) -> Tensor:
    """Which of photographs [2, 3, h, w], top row and left column, of random pieces [count, 3, 1, 1]."""
    drawn = [
        torch.randint(most, (count, 1, 1))
        for most in (len(photographs), photographs.shape[2] - height + 1, photographs.shape[3] - width + 1)
    ]
    return torch.stack(drawn, dim=1)


def _cut(photographs: Tensor, corners: Tensor, height: int, width: int) -> Tensor:
    """Pieces [n, 3, height, width] of photographs [2, 3, h, w] with corners [n, 3, 1, 1]."""
    which, top, left = corners.unbind(1)
    rows, columns = top + torch.arange(height).view(1, -1, 1), left + torch.arange(width).view(1, 1, -1)
    return photographs[which, :, rows, columns].permute(0, 3, 1, 2)
