"""No attack, as a control."""

from dataclasses import dataclass
from typing import ClassVar

from dhbe.attacks.base import Attack, Backdoor, Workshop
from dhbe.data import Images


@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """Trains a clean classifier, with which attacks are compared or from which they start."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "no backdoor: a clean classifier, for comparison and as a start for trojaning"
    weights: ClassVar[str] = "clean.safetensors"

    def plant(self, images: Images, shop: Workshop) -> Backdoor:
        return Backdoor(shop.train(images), None, None)

    def confirm(self, asr: float | None, acc: float | None = None, clean_acc: float | None = None) -> None:
        """Always passes, as there is no backdoor."""
