"""The verbs of the command line as functions."""

from dhbe.api.attacking import BACKDOORED, TRIGGER, attack
from dhbe.api.erasing import defend, erase
from dhbe.api.running import CLEAN, Erasure, Options
from dhbe.api.scoring import score, score_with_doubts
from dhbe.api.searching import Outcome, Searching, scan, verify
from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.measuring import measured

__all__ = [
    "BACKDOORED", "CLEAN", "TRIGGER", "Erasure", "Evidence", "Options", "Outcome", "Searching",
    "attack", "defend", "erase", "measured", "scan", "score",
    "score_with_doubts", "verify",
]  # fmt: skip
