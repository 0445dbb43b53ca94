"""Every verb of the command line as one call."""

from dhbe.api.attacking import BACKDOORED, TRIGGER, attack
from dhbe.api.erasing import defend, erase
from dhbe.api.measuring import measured, score
from dhbe.api.running import CLEAN, Erasure, Options
from dhbe.evidence import Evidence

__all__ = [
    "BACKDOORED", "CLEAN", "TRIGGER", "Erasure", "Evidence", "Options", "attack", "defend", "erase", "measured", "score",
]  # fmt: skip
