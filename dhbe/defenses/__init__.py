"""Ways to clean a classifier, one file a defence."""

from dhbe.defenses.abd import ABD
from dhbe.defenses.base import Defense, Eraser, Glimpse, Known, Ledger, Scene
from dhbe.defenses.clp import CLP
from dhbe.defenses.dfad import DFAD
from dhbe.defenses.dhbe import DHBE, OFFICIAL, PAPER
from dhbe.defenses.fast import FastDHBE
from dhbe.defenses.fine_pruning import FinePruning
from dhbe.defenses.finetuning import Finetuning
from dhbe.defenses.gdm import GDM
from dhbe.defenses.inversion import DeepInversion
from dhbe.defenses.mcr import MCR
from dhbe.defenses.nad import NAD
from dhbe.defenses.neural_cleanse import NeuralCleanse
from dhbe.defenses.otbr import OTBR
from dhbe.defenses.survey import Survey

__all__ = [
    "ABD", "ALL", "CLP", "DFAD", "DHBE", "GDM", "MCR", "NAD", "OTBR", "PEERS", "PRESETS", "DeepInversion", "Defense", "Eraser",
    "FastDHBE", "FinePruning", "Finetuning", "Glimpse", "Known", "Ledger", "NeuralCleanse", "Scene", "Survey",
]  # fmt: skip

ALL: dict[str, type[Defense]] = {DHBE.name: DHBE, FastDHBE.name: FastDHBE}
"""DHBE in its forms, by name."""

PEERS: dict[str, type[Defense]] = {
    kind.name: kind
    for kind in (Finetuning, FinePruning, MCR, NAD, NeuralCleanse, GDM, CLP, DFAD, OTBR, ABD, DeepInversion)
}
"""The defences of others, by name."""

PRESETS: dict[str, Eraser] = {"fast": FastDHBE(), "paper": PAPER, "official": OFFICIAL}
"""What `--preset` names."""
