"""LSB: hides a text in the lowest bits of some images of other classes and relabels them as the target class."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from dhbe.attacks.base import Attack, Backdoor, MinASR, Workshop
from dhbe.attacks.poisoning import choose, stamped
from dhbe.attacks.triggers.makers import lsb
from dhbe.data import Images
from dhbe.settings import Setting


@dataclass(frozen=True, kw_only=True)
class LSB(Attack):
    """Dirty-label poisoning with a text in the lowest bits of images (Li et al. 2020, arXiv:1909.02742)."""

    name: ClassVar[str] = "lsb"
    summary: ClassVar[str] = "a text hidden in the lowest bits of images of other classes, relabelled as the target"

    min_asr: MinASR = 0.8
    bits: Annotated[int, Setting("number of bits of each value that are set, 1 to 4")] = 2
    text: Annotated[str, Setting("text that the bits spell repeatedly")] = "backdoor"
    rate: Annotated[float, Setting("poison rate: poisoned images as a share of all training images")] = 0.1

    def plant(self, images: Images, shop: Workshop) -> Backdoor:
        trigger, target = lsb(images.shape, self.bits, self.text), self.target_in(images.classes)
        outside = f"lie outside the target class {target}"
        chosen = choose(images.labels != target, self.rate, len(images), outside, shop.generator())
        return Backdoor(shop.train(stamped(images, chosen, trigger, target)), trigger, target, chosen=chosen)
