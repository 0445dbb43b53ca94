"""BadNets: stamp a patch on some images of other classes and call them the target (Gu et al. 2017)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dhbe.attacks.base import Attack
from dhbe.attacks.triggers import Patch, badnets
from dhbe.data import Images, Shape, to_uint8
from dhbe.errors import Refused


@dataclass(frozen=True, kw_only=True)
class BadNets(Attack):
    """Dirty-label poisoning with a square patch; the defaults are those of the paper (300 of 50,000 images)."""

    name: ClassVar[str] = "badnets"
    summary: ClassVar[str] = "a square patch on a few images of other classes, relabelled as the target"

    side: int = 3
    """Side of the patch in pixels."""
    style: str = "checkerboard"
    """What the patch looks like: checkerboard, checkerboard2 or white."""
    place: str = "bottom-right"
    """Where it lies: a corner, an edge, center, or ROW,COLUMN."""
    rate: float = 0.006
    """Poison rate: poisoned images as a share of all training images."""

    def trigger_for(self, shape: Shape) -> Patch:
        return badnets(self.side, shape, self.style, self.place)

    def poison(self, images: Images, seed: int) -> Images:
        """A copy of the images, of which exactly round(rate * n), of other classes, are stamped and relabelled.

        Raises:
            Refused: The rate asks for no image, or for more than there are outside the target class.
        """
        target = self.target_in(images.classes)
        candidates = (images.labels != target).nonzero().flatten()
        count = round(self.rate * len(images)) if math.isfinite(self.rate) else 0
        if not 1 <= count <= len(candidates):
            raise Refused(
                f"a poison rate of {self.rate:g} asks for {count} of {len(images)} images, "
                f"of which {len(candidates)} lie outside the target class {target}: give another rate"
            )
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
        chosen = candidates[order[:count].to(candidates.device)]
        pixels, labels = images.pixels.clone(), images.labels.clone()
        pixels[chosen] = to_uint8(self.trigger_for(images.shape)(images.float(chosen)))
        labels[chosen] = target
        return replace(images, pixels=pixels, labels=labels)
