"""SIG: adds stripes to images of the target class."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from dhbe.attacks.base import Attack, Backdoor, MinASR, Workshop
from dhbe.attacks.poisoning import choose, stamped
from dhbe.attacks.triggers.makers import sig
from dhbe.data import Images
from dhbe.settings import Setting


@dataclass(frozen=True, kw_only=True)
class SIG(Attack):
    """Clean-label poisoning with sinusoidal stripes (Barni et al. 2019, arXiv:1902.11237)."""

    name: ClassVar[str] = "sig"
    summary: ClassVar[str] = "sinusoidal stripes on images of the target class, labels kept"

    min_asr: MinASR = 0.8
    delta: Annotated[float, Setting("amplitude of the stripes, in units of 1/255 (20 to 40 in the literature)")] = 30.0
    cycles: Annotated[float, Setting("number of stripes across the image")] = 6.0
    share: Annotated[float, Setting("share of the target class's images that are changed")] = 0.5

    def plant(self, images: Images, shop: Workshop) -> Backdoor:
        trigger, target = sig(images.shape, self.delta, self.cycles), self.target_in(images.classes)
        members = images.labels == target
        who = f"lie in the target class {target}"
        chosen = choose(members, self.share, int(members.sum()), who, shop.generator())
        return Backdoor(shop.train(stamped(images, chosen, trigger, None)), trigger, target, chosen=chosen)
