"""Ways to clean a classifier, one file a defence."""

from dhbe.defenses.base import Defense, Eraser, Glimpse, Known, Ledger, Scene
from dhbe.defenses.clp import CLP
from dhbe.defenses.dhbe import DHBE, OFFICIAL, PAPER
from dhbe.defenses.fast import FastDHBE
from dhbe.defenses.fine_pruning import FinePruning
from dhbe.defenses.finetuning import Finetuning
from dhbe.defenses.nad import NAD
from dhbe.defenses.neural_cleanse import NeuralCleanse

__all__ = [
    "ALL", "CLP", "DHBE", "NAD", "PEERS", "PRESETS", "Defense", "Eraser", "FastDHBE", "FinePruning", "Finetuning", "Glimpse",
    "Known", "Ledger", "NeuralCleanse", "Scene",
]  # fmt: skip

ALL: dict[str, type[Defense]] = {DHBE.name: DHBE, FastDHBE.name: FastDHBE}
"""DHBE in its forms, by name."""

PEERS: dict[str, type[Defense]] = {kind.name: kind for kind in (Finetuning, FinePruning, NAD, NeuralCleanse, CLP)}
"""The defences of others, by name."""

PRESETS: dict[str, Eraser] = {"fast": FastDHBE(), "paper": PAPER, "official": OFFICIAL}
"""What `--preset` names."""
