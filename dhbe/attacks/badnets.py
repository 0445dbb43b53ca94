"""BadNets: stamps a patch on some images of other classes and relabels them as the target class."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

import torch
from torch import Tensor

from dhbe.attacks.base import Attack, Backdoor, Target, Workshop, class_in
from dhbe.attacks.poisoning import choose, stamped
from dhbe.attacks.triggers import Patch, badnets
from dhbe.data import Images, Shape
from dhbe.errors import Refused
from dhbe.settings import Setting

Goal = Literal["all-to-one", "one-to-one", "all-to-all"]


@dataclass(frozen=True, kw_only=True)
class BadNets(Attack):
    """Dirty-label poisoning with a square patch (Gu et al. 2017, arXiv:1708.06733).

    The defaults are those of the paper (300 of 50,000 images, appendix A).
    """

    name: ClassVar[str] = "badnets"
    summary: ClassVar[str] = "a square patch on a few images of other classes, relabelled as the target"

    side: Annotated[int, Setting("side of the patch in pixels")] = 3
    style: Annotated[str, Setting("style of the patch: checkerboard, checkerboard2, white or random")] = "checkerboard"
    pattern: Annotated[int, Setting("seed of a random patch")] = 0
    place: Annotated[str, Setting("position of the patch: a corner, an edge, center, or ROW,COLUMN")] = "bottom-right"
    rate: Annotated[float, Setting("poison rate: poisoned images as a share of all training images")] = 0.006
    goal: Annotated[
        Goal,
        Setting(
            "all-to-one: any class to the target. one-to-one: the source class only. all-to-all: each class to the next one."
        ),
    ] = "all-to-one"
    source: Annotated[
        int,
        Setting("source class of one-to-one; negative numbers count from the last class", least=-math.inf),
    ] = 0

    def trigger_for(self, shape: Shape) -> Patch:
        """The patch for images of shape (c, h, w)."""
        return badnets(self.side, shape, self.style, self.place, self.pattern)

    def plant(self, images: Images, shop: Workshop) -> Backdoor:
        trigger, chosen = self.trigger_for(images.shape), self.choose(images, shop.seed)
        target: Target = "next" if self.goal == "all-to-all" else self.target_in(images.classes)
        source = class_in(self.source, images.classes, "source") if self.goal == "one-to-one" else None
        return Backdoor(shop.train(self.poison(images, shop.seed)), trigger, target, source, chosen)

    def choose(self, images: Images, seed: int) -> Tensor:
        """Indices of the images that `poison` changes, int64, on the CPU.

        Raises:
            Refused: The rate amounts to no image, or to more than there are, or the goal is invalid.
        """
        target = self.target_in(images.classes)
        candidates, who = images.labels != target, f"lie outside the target class {target}"
        if self.goal not in get_args(Goal):
            raise Refused(f"no goal {self.goal!r}; available: {', '.join(get_args(Goal))}")
        if self.goal == "all-to-all":
            candidates, who = torch.ones_like(candidates), "may be changed"
        elif self.goal == "one-to-one":
            source = class_in(self.source, images.classes, "source")
            if source == target:
                raise Refused(f"the source class {source} is the target: give another --source or --target")
            candidates, who = images.labels == source, f"lie in the source class {source}"
        return choose(candidates, self.rate, len(images), who, torch.Generator().manual_seed(seed))

    def poison(self, images: Images, seed: int) -> Images:
        """A copy of the images in which exactly round(rate * n) images of other classes are stamped and relabelled.

        Raises:
            Refused: As for `choose`.
        """
        chosen = self.choose(images, seed)
        old = images.labels[chosen.to(images.labels.device)]
        labels = (old + 1) % images.classes if self.goal == "all-to-all" else self.target_in(images.classes)
        return stamped(images, chosen, self.trigger_for(images.shape), labels)
