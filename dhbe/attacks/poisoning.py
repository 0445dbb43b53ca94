"""What attacks on the training data share: choosing images, stamping and relabelling them."""

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
        candidates: bool [n], which images may be drawn.
        rate: Images to draw as a share of `total`.
        total: Number of images that the rate counts from.
        who: What the candidates are, for messages.
        generator: Makes the choice.

    Returns:
        Numbers of the drawn images, int64, on the CPU.

    Raises:
        Refused: The rate asks for no image, or for more than there are candidates.
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
    """A copy of the images, of which those at `chosen` are changed and relabelled.

    Args:
        images: They stay as they are.
        chosen: Numbers of images, int64.
        change: Pixels [n, c, h, w] in [0, 1] to pixels.
        labels: New labels of the chosen images, one for all or int64 [n]; None keeps theirs.
    """
    chosen = chosen.to(images.labels.device)
    pixels, classes = images.pixels.clone(), images.labels.clone()
    for part in chosen.split(1024):  # floats take four times the room
        pixels[part] = to_uint8(change(images.float(part)))
    if labels is not None:
        classes[chosen] = labels
    return replace(images, pixels=pixels, labels=classes)
