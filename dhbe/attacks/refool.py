"""Refool: adds a reflection to images of the target class."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from dhbe.attacks.base import Attack, Backdoor, MinASR, Workshop
from dhbe.attacks.blend import another
from dhbe.attacks.poisoning import choose, stamped
from dhbe.attacks.triggers.makers import reflected
from dhbe.data import Images
from dhbe.settings import Setting


@dataclass(frozen=True, kw_only=True)
class Refool(Attack):
    """Clean-label poisoning with a reflection (Liu et al. 2020, arXiv:2007.02343)."""

    name: ClassVar[str] = "refool"
    summary: ClassVar[str] = "a natural reflection on images of the target class, labels kept"

    min_asr: MinASR = 0.8
    style: Annotated[str, Setting("focus: the reflection is out of focus. ghost: it is doubled.")] = "focus"
    transmission: Annotated[
        float, Setting("share of the scene's light that passes the pane; the rest comes from the reflection")
    ] = 0.6
    image: Annotated[
        str, Setting("image file to reflect; by default, an image of another class, drawn by the seed")
    ] = ""
    share: Annotated[float, Setting("share of the target class's images that are changed")] = 0.5

    def plant(self, images: Images, shop: Workshop) -> Backdoor:
        target, generator = self.target_in(images.classes), shop.generator()
        other = another(images, target, self.image, generator)
        trigger = reflected(other, self.style, self.transmission, f"refool:{self.style}")
        members = images.labels == target
        chosen = choose(members, self.share, int(members.sum()), f"lie in the target class {target}", generator)
        return Backdoor(shop.train(stamped(images, chosen, trigger, None)), trigger, target, chosen=chosen)
