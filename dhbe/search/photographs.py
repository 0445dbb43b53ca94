"""Random crops of the two photographs shipped with scikit-learn, or of a user's pictures: natural images without labels.

A teacher's predictions on them are confident and diverse, and distillation on crops of a single photograph is known to work
well (Asano and Saeed 2023, arXiv:2112.00725). They do not require BatchNorm, and contain no trigger.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dhbe.data import Shape

FINENESS = 2**0.5
"""Factor by which the photographs shrink from one pyramid level to the next."""


AT_ONCE = 256
"""Crops processed at a time; the random draws do not depend on it."""


def pieces(count: int, shape: Shape, pictures: Sequence[Tensor] | None = None) -> Tensor:
    """Random crops at all scales, randomly flipped and recoloured.

    They are drawn from torch's CPU generator, whatever the default device.

    Args:
        count: Number of crops.
        shape: Their shape (c, h, w) with c 1 or 3; one channel gives grey.
        pictures: What they are cut from, each uint8 [3, h, w]; None means the two photographs.

    Returns:
        Pixels [count, c, h, w] in [0, 1], on the CPU.
    """
    with torch.device("cpu"):
        channels, height, width = shape
        pictures = photographs() if pictures is None else pictures
        which = torch.randint(len(pictures), (count,))
        depth = torch.tensor([levels(picture, max(height, width)) for picture in pictures])[which]
        level = (torch.rand(count) * depth).long()
        place = torch.rand(count, 2)
        flipped, order = torch.rand(count, 1, 1, 1) < 0.5, torch.rand(count, 3).argsort(1)
        shuffled = torch.rand(count, 1, 1, 1) < 0.5
        contrast, tint = 0.6 + torch.rand(count, 1, 1, 1), 0.3 * torch.rand(count, 3, 1, 1) - 0.15
        cut = torch.empty(count, 3, height, width, dtype=torch.uint8)
        for number, step in torch.stack([which, level], 1).unique(dim=0).tolist():
            shrunk = _shrunk(pictures[number], max(height, width), step)
            room = torch.tensor(shrunk.shape[1:]) - torch.tensor([height, width]) + 1
            for one in ((which == number) & (level == step)).nonzero().flatten().tolist():
                top, left = (place[one] * room).long().tolist()
                cut[one] = shrunk[:, top : top + height, left : left + width]
        drawn = torch.empty(count, *shape)
        for some in torch.arange(count).split(AT_ONCE):
            each = cut[some].float() / 255
            each = torch.where(flipped[some], each.flip(3), each)
            each = torch.where(shuffled[some], each.gather(1, order[some][..., None, None].expand_as(each)), each)
            middle = each.mean((1, 2, 3), keepdim=True)
            each = ((each - middle) * contrast[some] + middle + tint[some]).clamp(0, 1)
            drawn[some] = each if channels == 3 else each.mean(1, keepdim=True)
        return drawn


@cache
def photographs() -> list[Tensor]:
    """The two photographs, each uint8 [3, h, w]."""
    from sklearn.datasets import load_sample_images

    return [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]


def levels(picture: Tensor, side: int) -> int:
    """The number of sizes at which a picture [3, h, w] is cropped: from full size until its shorter side is `side` pixels."""
    return 1 + max(0, math.floor(math.log(min(picture.shape[1:]) / side, FINENESS)))


def _shrunk(picture: Tensor, side: int, step: int) -> Tensor:
    """A picture [3, h, w] at one of its sizes, uint8; one smaller than `side` is enlarged."""
    height, width = picture.shape[1:]
    shorter = max(side, round(min(height, width) / FINENESS**step))
    if shorter == min(height, width):
        return picture
    size = (
        max(side, round(height * shorter / min(height, width))),
        max(side, round(width * shorter / min(height, width))),
    )
    resized = F.interpolate(picture[None].float(), size=size, mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)
