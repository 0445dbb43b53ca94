"""Ways to plant a backdoor, one file an attack; `ALL` lists them."""

from dhbe.attacks.badnets import BadNets
from dhbe.attacks.base import Attack, Backdoor

__all__ = ["ALL", "Attack", "Backdoor", "BadNets"]

ALL: dict[str, type[Attack]] = {"badnets": BadNets}
