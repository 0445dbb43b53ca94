"""Defences of other authors, one file each."""

from dhbe.defenses.base import Defense
from dhbe.defenses.peers.abd import ABD
from dhbe.defenses.peers.clp import CLP
from dhbe.defenses.peers.dfad import DFAD
from dhbe.defenses.peers.fine_pruning import FinePruning
from dhbe.defenses.peers.finetuning import Finetuning
from dhbe.defenses.peers.gdm import GDM
from dhbe.defenses.peers.inversion import DeepInversion
from dhbe.defenses.peers.mcr import MCR
from dhbe.defenses.peers.nad import NAD
from dhbe.defenses.peers.neural_cleanse import NeuralCleanse
from dhbe.defenses.peers.otbr import OTBR

PEERS: dict[str, type[Defense]] = {
    kind.name: kind
    for kind in (Finetuning, FinePruning, MCR, NAD, NeuralCleanse, GDM, CLP, DFAD, OTBR, ABD, DeepInversion)
}
"""By name."""
