"""WaNet: warps some images of other classes and relabels them as the target class."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from dhbe.attacks.base import Attack, Backdoor, MinASR, Workshop
from dhbe.attacks.poisoning import choose, stamped
from dhbe.attacks.triggers import Warp
from dhbe.attacks.triggers.makers import warp
from dhbe.data import Images
from dhbe.settings import Setting


@dataclass(frozen=True, kw_only=True)
class WaNet(Attack):
    """Dirty-label poisoning with a smooth warp (Nguyen and Tran 2021, arXiv:2102.10369).

    Further images are warped differently and keep their labels, so that only this one warp is a trigger (the paper's
    noise mode). Images are poisoned once, before training; the paper draws them anew in every batch.
    """

    name: ClassVar[str] = "wanet"
    summary: ClassVar[str] = "a smooth warp of images of other classes, relabelled as the target"

    min_asr: MinASR = 0.8
    strength: Annotated[float, Setting("the paper's s, about twice the mean shift in pixels")] = 0.5
    grid: Annotated[int, Setting("the paper's k: shifts are drawn at k x k points")] = 4
    rate: Annotated[float, Setting("poison rate: warped and relabelled images as a share of all training images")] = 0.1
    noise_rate: Annotated[
        float, Setting("share of all training images that are warped differently and keep their labels; 0 for none")
    ] = 0.2

    def plant(self, images: Images, shop: Workshop) -> Backdoor:
        trigger = warp(images.shape, self.strength, self.grid, shop.seed)
        target, generator = self.target_in(images.classes), shop.generator()
        outside = f"lie outside the target class {target}"
        poisoned = choose(images.labels != target, self.rate, len(images), outside, generator)
        training, chosen = stamped(images, poisoned, trigger, target), poisoned
        if self.noise_rate > 0:
            rest = torch.ones(len(images), dtype=torch.bool)
            rest[poisoned] = False
            others = choose(rest, self.noise_rate, len(images), "are not poisoned", generator)
            training = stamped(training, others, lambda pixels: _shaken(pixels, trigger, generator), None)
            chosen = torch.cat([poisoned, others])
        return Backdoor(shop.train(training), trigger, target, chosen=chosen)


def _shaken(pixels: Tensor, trigger: Warp, generator: torch.Generator) -> Tensor:
    """Warps each image [n, c, h, w] with the trigger's shifts plus its own noise of the same size."""
    shaken = []
    for image in pixels:
        noise = torch.rand(trigger.control.shape, generator=generator) * 2 - 1
        shaken.append(Warp(trigger.control + noise, trigger.strength, trigger.shape)(image[None]))
    return torch.cat(shaken)
