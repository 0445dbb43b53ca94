"""Backdoor attacks, one file each; `ALL` lists them by name."""

from dhbe.attacks.badnets import BadNets
from dhbe.attacks.base import Attack, Backdoor, Target, Workshop
from dhbe.attacks.blend import Blend
from dhbe.attacks.clean_label import CleanLabel
from dhbe.attacks.lsb import LSB
from dhbe.attacks.none import NoAttack
from dhbe.attacks.refool import Refool
from dhbe.attacks.sig import SIG
from dhbe.attacks.trojaning import Trojaning
from dhbe.attacks.wanet import WaNet

__all__ = ["ALL", "Attack", "Backdoor", "BadNets", "Target", "Workshop"]

ALL: dict[str, type[Attack]] = {
    kind.name: kind for kind in (BadNets, CleanLabel, Trojaning, SIG, Blend, LSB, Refool, WaNet, NoAttack)
}
