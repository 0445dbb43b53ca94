"""A folder of any pictures, without labels: natural images besides the photographs that come with the package."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dhbe.data.folders import decode, pictures_below
from dhbe.errors import Refused

MOST = 2000
"""Maximum number of pictures read; of more, as many evenly spaced ones are."""

SHORTER, LONGER = 256, 512
"""Sides in pixels to which larger pictures are shrunk and then cropped, so that 2000 of them take less than 800 MB."""


def load_pictures(root: Path) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Reads the pictures in a folder and in the folders below it, in the order of their names.

    Args:
        root: The folder. Hidden files and annotations (.txt, .json, ...) are ignored.

    Returns:
        The pictures, each uint8 [3, h, w] with a shorter side of at most `SHORTER` pixels, and notes, one line each.

    Raises:
        Refused: The folder cannot be read or holds no picture, a file is no image, or is broken or huge.
    """
    if not root.is_dir():
        raise Refused(f"--images {root}: no such folder: give one with pictures of any kind, labels are not needed")
    paths = list(pictures_below(root))
    if not paths:
        raise Refused(f"--images {root}: the folder holds no pictures")
    chosen = torch.linspace(0, len(paths) - 1, min(MOST, len(paths)), dtype=torch.float64).long().tolist()
    notes = (f"{MOST} of the {len(paths)} pictures in {root} are used",) if len(paths) > MOST else ()
    return tuple(_bounded(decode(paths[index], paths[index])) for index in chosen), notes


def _bounded(picture: Tensor) -> Tensor:
    """A picture shrunk to the shorter side `SHORTER`, of which the middle is kept if it is longer than `LONGER`."""
    height, width = picture.shape[1:]
    if min(height, width) > SHORTER:
        height, width = (round(side * SHORTER / min(height, width)) for side in (height, width))
        shrunk = F.interpolate(picture[None].float(), size=(height, width), mode="bilinear", antialias=True)
        picture = shrunk[0].round().clamp(0, 255).to(torch.uint8)
    top, left = max(0, height - LONGER) // 2, max(0, width - LONGER) // 2
    return picture[:, top : top + LONGER, left : left + LONGER].clone()
