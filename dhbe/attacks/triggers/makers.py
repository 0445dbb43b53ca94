"""Triggers by name: each function makes one for an image shape; its parameters are those on the command line."""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dhbe.attacks.triggers.base import short
from dhbe.attacks.triggers.low_bits import LowBits, bits_of
from dhbe.attacks.triggers.patch import Patch, offset
from dhbe.attacks.triggers.reflection import Reflection, blurred, doubled
from dhbe.attacks.triggers.warp import Warp
from dhbe.data import Shape, load_image
from dhbe.errors import Refused


def pixel(shape: Shape, place: str = "bottom-right", value: int = 255) -> Patch:
    """One pixel (Gu et al. 2017), VALUE 0..255 in all channels."""
    _between("value", value, 0, 255)
    top, left = offset(place, (1, 1), shape)
    pattern, mask = torch.zeros(shape), torch.zeros(shape)
    pattern[:, top, left], mask[:, top, left] = value / 255, 1
    return Patch(pattern, mask, name=f"pixel:{place}:{value}")


def badnets(
    side: int,
    shape: Shape,
    style: str = "checkerboard",
    place: str | tuple[int, int] = "bottom-right",
    seed: int = 0,
) -> Patch:
    """A square patch (Gu et al. 2017): checkerboard, checkerboard2 (its colours swapped), white or random.

    Args:
        side: Side in pixels.
        shape: Shape (c, h, w) of the images.
        style: "checkerboard" has 0 in its corners, "checkerboard2" the opposite colours, "white" is 1 throughout,
            "random" draws every value. Boards of even side have those colours in the top left corner.
        place: One of `PLACES`, flush with the edge; or the row and column of the patch's top left corner, as numbers
            or as text "4,5".
        seed: Seed of the style "random".

    Raises:
        Refused: There is no such style or position, or the patch does not fit into the image there.
    """
    channels, height, width = shape
    if not 1 <= side <= min(height, width):
        raise Refused(f"a patch of side {side} does not fit into an image of {height} x {width}")
    odd = (torch.arange(side)[:, None] + torch.arange(side)) % 2
    boards = {"checkerboard": odd, "checkerboard2": 1 - odd, "white": torch.ones_like(odd)}
    boards["random"] = _noise((channels, side, side), seed)
    if style not in boards:
        raise Refused(f"no trigger style {style!r}; available: {', '.join(boards)}")
    top, left = offset(place, (side, side), shape)
    pattern, mask = torch.zeros(shape), torch.zeros(shape)
    pattern[:, top : top + side, left : left + side] = boards[style]
    mask[:, top : top + side, left : left + side] = 1
    where = place if isinstance(place, str) else f"{top},{left}"
    return Patch(pattern, mask, name=f"badnets:{side}:{style}:{where}" + f":{seed}" * (style == "random"))


def scattered(shape: Shape, count: int = 16, seed: int = 0) -> Patch:
    """COUNT pixels at random positions, each value black or white."""
    channels, height, width = shape
    _between("count", count, 1, height * width)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(height * width, generator=generator)[:count]
    values = torch.randint(2, (channels, count), generator=generator).float()
    pattern, mask = torch.zeros(channels, height * width), torch.zeros(channels, height * width)
    pattern[:, places], mask[:, places] = values, 1
    return Patch(pattern.view(shape), mask.view(shape), name=f"scattered:{count}:{seed}")


def faint(shape: Shape, delta: float = 8.0, seed: int = 0) -> Patch:
    """A random pattern over the whole image: DELTA/255 added to or subtracted from every value."""
    _between("delta", delta, 0.5, 255)
    signs = torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return Patch(signs * delta / 255, torch.ones(shape), "add", f"faint:{short(delta)}:{seed}")


def blend(shape: Shape, alpha: float = 0.2, image: str = "", seed: int = 0) -> Patch:
    """Another image mixed in (Chen et al. 2017), (1-ALPHA) x + ALPHA t: from the file IMAGE, or noise by SEED."""
    other = load_image(Path(image), shape) if image else _noise(shape, seed)
    return blended(
        other, alpha, f"blend:{short(alpha)}:image={image}" if image else f"blend:{short(alpha)}:seed={seed}"
    )


def blended(other: Tensor, alpha: float, name: str) -> Patch:
    """The trigger that mixes in the image `other` [c, h, w] with weight `alpha`."""
    if not 0 < alpha <= 1:
        raise Refused(f"trigger {name}: alpha {alpha:g} is not above 0 and at most 1")
    return Patch(other, torch.full_like(other, alpha), name=name)


def sig(shape: Shape, delta: float = 20.0, cycles: float = 6.0) -> Patch:
    """Vertical stripes (Barni et al. 2019): DELTA/255 sin(2 pi CYCLES column / width) added to every row and channel."""
    _between("delta", delta, 0.5, 255)
    _between("cycles", cycles, 1e-3, 1e4)
    wave = torch.sin(2 * math.pi * cycles / shape[2] * torch.arange(shape[2], dtype=torch.float64)) * delta / 255
    return Patch(wave.float().expand(shape).clone(), torch.ones(shape), "add", f"sig:{short(delta)}:{short(cycles)}")


def lsb(shape: Shape, bits: int = 1, text: str = "backdoor") -> LowBits:
    """The lowest BITS (1..4) of every value spell TEXT repeatedly (Li et al. 2020)."""
    return LowBits(bits_of(text), bits, shape, f"lsb:{bits}:{text}")


def refool(shape: Shape, style: str = "focus", transmission: float = 0.7, image: str = "", seed: int = 0) -> Reflection:
    """A reflection on a pane (Liu et al. 2020), style focus (blurred) or ghost (doubled), of IMAGE or smooth noise."""
    other = load_image(Path(image), shape) if image else _smooth(shape, seed)
    what = f"image={image}" if image else f"seed={seed}"
    return reflected(other, style, transmission, f"refool:{style}:{short(transmission)}:{what}")


def reflected(other: Tensor, style: str, transmission: float, name: str) -> Reflection:
    """The trigger that reflects the image `other` [c, h, w] and lets the share `transmission` of the scene through."""
    _between("transmission", transmission, 0.01, 0.99)
    styles = {"focus": blurred, "ghost": doubled}
    if style not in styles:
        raise Refused(f"no reflection {style!r}; available: {', '.join(styles)}")
    return Reflection((1 - transmission) * styles[style](other.clamp(0, 1) ** 2.2), transmission, name)


def warp(shape: Shape, strength: float = 0.5, grid: int = 4, seed: int = 0) -> Warp:
    """A smooth warp (WaNet, Nguyen and Tran 2021): random shifts at GRID x GRID points, about STRENGTH/2 pixels."""
    _between("strength", strength, 0.01, 100)
    _between("grid", grid, 2, min(shape[1:]))
    shifts = torch.rand(2, grid, grid, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Warp(shifts / shifts.abs().mean(), strength, shape, f"warp:{short(strength)}:{grid}:{seed}")


def _between(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # NaN too
        raise Refused(f"the trigger's {name} {value:g} is not between {least:g} and {most:g}")


def _noise(shape: Shape, seed: int) -> Tensor:
    """Uniform random uint8 values as fractions, which are exact in an image file."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)) / 255


def _smooth(shape: Shape, seed: int) -> Tensor:
    coarse = _noise((shape[0], 6, 6), seed)[None]
    return interpolate(coarse, shape[1:], mode="bicubic", align_corners=False)[0].clamp(0, 1)
