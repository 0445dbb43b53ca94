"""Blend: mixes another image into some images of other classes and relabels them as the target class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from dhbe.attacks.base import Attack, Backdoor, Workshop
from dhbe.attacks.poisoning import choose, stamped
from dhbe.attacks.triggers.makers import blended
from dhbe.data import Images, load_image
from dhbe.settings import Setting


@dataclass(frozen=True, kw_only=True)
class Blend(Attack):
    """Dirty-label poisoning with another image mixed in (Chen et al. 2017, arXiv:1712.05526)."""

    name: ClassVar[str] = "blend"
    summary: ClassVar[str] = "another image mixed into a few images of other classes, relabelled as the target"

    alpha: Annotated[float, Setting("weight of the other image (0.1 to 0.2 in the literature)")] = 0.2
    image: Annotated[str, Setting("image file to mix in; by default, an image of another class, drawn by the seed")] = (
        ""
    )
    rate: Annotated[float, Setting("poison rate: poisoned images as a share of all training images")] = 0.02

    def plant(self, images: Images, shop: Workshop) -> Backdoor:
        target, generator = self.target_in(images.classes), shop.generator()
        trigger = blended(another(images, target, self.image, generator), self.alpha, f"blend:{self.alpha:g}")
        outside = f"lie outside the target class {target}"
        chosen = choose(images.labels != target, self.rate, len(images), outside, generator)
        return Backdoor(shop.train(stamped(images, chosen, trigger, target)), trigger, target, chosen=chosen)


def another(images: Images, target: int, file: str, generator: torch.Generator) -> Tensor:
    """The image in a file, or a random training image outside the target class: float [c, h, w] in [0, 1].

    Raises:
        Refused: The file is not an image, or there is no such training image.
    """
    if file:
        return load_image(Path(file), images.shape)
    outside = f"lie outside the target class {target}"
    drawn = choose(images.labels != target, 1 / len(images), len(images), outside, generator)
    return images.float(drawn.to(images.pixels.device))[0].cpu()
