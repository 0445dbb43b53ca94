"""Experiments: tables and figures as lists of cases, run locally or on a cluster, and drawn from their records.

Light to import: computing code is imported only by the processes that compute.
"""

from dhbe.bench.cases import Case, Labels, called, erased, planted, scanned
from dhbe.bench.drawing import Curves, Grid
from dhbe.bench.experiment import Experiment, Results
from dhbe.bench.scales import PAPER, SCALES, SMALL, SMOKE, Scale

__all__ = [
    "PAPER", "SCALES", "SMALL", "SMOKE", "Case", "Curves", "Experiment", "Grid", "Labels", "Results", "Scale",
    "called", "erased", "planted", "scanned",
]  # fmt: skip
