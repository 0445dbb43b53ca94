"""Ways to clean a classifier, one file a defence."""

from dhbe.defenses.base import Defense, Eraser, Glimpse, Known, Ledger, Scene
from dhbe.defenses.dhbe import DHBE, OFFICIAL, PAPER
from dhbe.defenses.fast import FastDHBE

__all__ = ["ALL", "DHBE", "PRESETS", "Defense", "Eraser", "FastDHBE", "Glimpse", "Known", "Ledger", "Scene"]

ALL: dict[str, type[Defense]] = {DHBE.name: DHBE, FastDHBE.name: FastDHBE}

PRESETS: dict[str, Eraser] = {"fast": FastDHBE(), "paper": PAPER, "official": OFFICIAL}
"""What `--preset` names."""
