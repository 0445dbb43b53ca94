"""Defences, one file each: the variants of DHBE here, those of other authors in `peers`."""

from dhbe.defenses.base import Defense, Eraser, Known, RoundInfo, Samples
from dhbe.defenses.dhbe import DHBE, OFFICIAL, PAPER
from dhbe.defenses.fast import FastDHBE
from dhbe.defenses.peers import PEERS

__all__ = ["DHBE", "PEERS", "PRESETS", "Defense", "Eraser", "FastDHBE", "Known", "RoundInfo", "Samples"]

PRESETS: dict[str, Eraser] = {"fast": FastDHBE(), "paper": PAPER, "official": OFFICIAL}
"""The values of `--preset`."""
