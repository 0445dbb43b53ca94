"""Does bf16 cost quality? The default erasure in fp32 and in bf16, five seeds each, and the intervals of what differs.

    python -m experiments.precision run     # results/precision/VICTIM_PRECISION_SEED.json; what is there is left alone
    python -m experiments.precision table   # of docs/performance.md

The victim is of `zoo/`; CIFAR-10 is read from $DHBE_DATA or downloaded, and all 10,000 test images measure.
"""

import statistics
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

from dhbe import api, data, records
from dhbe.api import machine
from dhbe.evaluation.metrics import bootstrap
from experiments import missing, pages, victims

RESULTS = victims.ROOT / "results" / "precision"
VICTIM, SEEDS = "badnets-3", (0, 1, 2, 3, 4)
PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
RATES = ("acc", "asr")


def path(precision: str, seed: int) -> Path:
    """Where a record lies."""
    return RESULTS / f"{VICTIM}_{precision}_{seed}.json"


def erased(seed: int, precision: Literal["fp32", "bf16"]) -> records.Record:
    """The record of one run."""
    suspect, evidence = victims.load(VICTIM, data.load(victims.DATA, "test"))
    return api.erase(suspect, precision=precision, seed=seed, evidence=evidence).record


def run() -> None:
    """Runs what has no record yet."""
    both = product(SEEDS, PRECISIONS)
    missing.run(((path(precision, seed).stem, partial(erased, seed, precision)) for seed, precision in both), RESULTS)


def table() -> str:
    """A row for each precision, and one for the difference, seed by seed."""
    rates = {
        precision: {rate: [measured(path(precision, seed), rate) for seed in SEEDS] for rate in RATES}
        for precision in PRECISIONS
    }
    rows = [(precision, *(told(values) for values in found.values())) for precision, found in rates.items()]
    apart = [[b - a for a, b in zip(rates["fp32"][rate], rates["bf16"][rate], strict=True)] for rate in RATES]
    rows.append(("bf16 less fp32", *(told(values) for values in apart)))
    return pages.table((VICTIM, *(f"{rate.upper()} %, mean and 95 % interval" for rate in RATES)), rows)


def measured(path: Path, rate: str) -> float:
    """A rate after the run, in points of a hundred."""
    return 100 * getattr(records.read(path).after, rate)


def told(values: list[float]) -> str:
    """The mean and its interval."""
    low, high = bootstrap(values)
    return f"{statistics.mean(values):.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    if sys.argv[1] == "run":
        machine.keep_memory()
        run()
    else:
        pages.tell("docs/performance.md", {"experiments/precision.py": table()})
