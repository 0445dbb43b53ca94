"""No attack: the control."""

from dataclasses import dataclass
from typing import ClassVar

from dhbe.attacks.base import Attack, Backdoor, Workshop
from dhbe.data import Images


@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """No backdoor at all: the clean classifier that an attack is compared with, or starts from."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "no backdoor: a clean classifier, to compare with and for trojaning to start from"

    def plant(self, images: Images, shop: Workshop) -> Backdoor:
        return Backdoor(shop.train(images), None, None)

    def confirm(self, asr: float | None, acc: float | None = None, clean_acc: float | None = None) -> None:
        """Passes: there is nothing to miss."""
