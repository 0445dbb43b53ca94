"""Does bf16 cost quality? The default erasure in fp32 and bf16, five seeds each, with intervals of the difference.

The records in `results/precision/` are of `badnets-3` of `zoo/`, all 10,000 test images of CIFAR-10 measuring;
`dhbe bench run precision --scale small` makes such of a victim of its own.
"""

import statistics
from pathlib import Path

from dhbe import records
from dhbe.bench import pages
from dhbe.evaluation.metrics import bootstrap
from experiments import ROOT

RESULTS = ROOT / "results" / "precision"
VICTIM, SEEDS = "badnets-3", (0, 1, 2, 3, 4)
PRECISIONS = ("fp32", "bf16")
RATES = ("acc", "asr")


def path(precision: str, seed: int) -> Path:
    """The path of a record."""
    return RESULTS / f"{VICTIM}_{precision}_{seed}.json"


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
    """A rate after the run, in percent."""
    return 100 * getattr(records.read(path).after, rate)


def told(values: list[float]) -> str:
    """The mean and its interval."""
    low, high = bootstrap(values)
    return f"{statistics.mean(values):.2f} ({low:.2f} to {high:.2f})"


def tables() -> dict[str, str]:
    """That of docs/performance.md."""
    return {"experiments/precision.py": table()}


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
