"""Shared parts of poisoning attacks: choosing images, stamping and relabelling them."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dhbe.data import Images, to_uint8
from dhbe.errors import Refused


def choose(candidates: Tensor, rate: float, total: int, who: str, generator: torch.Generator) -> Tensor:
    """Draws round(rate * total) of the candidates.

    Args:
        candidates: Which images may be drawn, bool [n].
        rate: Images to draw as a share of `total`.
        total: Number of images to which the rate refers.
        who: Description of the candidates for messages.
        generator: Random generator of the draw.

    Returns:
        Indices of the drawn images, int64, on the CPU.

    Raises:
        Refused: The rate amounts to no image, or to more than there are candidates.
    """
    numbers = candidates.nonzero().flatten().cpu()
    count = round(rate * total) if math.isfinite(rate) else 0
    if not 1 <= count <= len(numbers):
        raise Refused(
            f"a poison rate of {rate:g} asks for {count} of {total} images, of which {len(numbers)} {who}: "
            "give another rate"
        )
    return numbers[torch.randperm(len(numbers), generator=generator)[:count]]


def stamped(images: Images, chosen: Tensor, change: Callable[[Tensor], Tensor], labels: Tensor | int | None) -> Images:
    """A copy of the images in which those at `chosen` are changed and relabelled.

    Args:
        images: The images; they are not changed.
        chosen: Indices of images, int64.
        change: Maps pixels [n, c, h, w] in [0, 1] to pixels.
        labels: New labels of the chosen images, one for all or int64 [n]; None keeps the old ones.
    """
    chosen = chosen.to(images.labels.device)
    pixels, classes = images.pixels.clone(), images.labels.clone()
    for part in chosen.split(1024):  # limits the memory for floats
        pixels[part] = to_uint8(change(images.float(part)))
    if labels is not None:
        classes[chosen] = labels
    return replace(images, pixels=pixels, labels=classes)
