"""Ablation of `fast`, and whether data-free signs rank its outcomes.

The records in `results/sweep/` are of a victim of `zoo/` and of a network that flattens its features, 3000 test images of
CIFAR-10 measuring; `dhbe bench run ablation --scale small` makes such of a victim of its own.
"""

from dataclasses import dataclass
from pathlib import Path

from scipy.stats import spearmanr

from dhbe import records
from dhbe.bench import pages
from dhbe.bench.experiments.ablation import TAKEN_OUT
from experiments import ROOT

RESULTS = ROOT / "results" / "sweep"
VICTIMS = ("trojaning-5", "white4_flat_cifar10_17")
PARTS = ("all of it", *(name for name in TAKEN_OUT if name != "nothing"))


def path(victim: str, name: str) -> Path:
    """The path of a record."""
    return RESULTS / f"{victim}_{name.replace(' ', '-').replace(',', '')}.json"


@dataclass(frozen=True)
class Outcome:
    """One run; rates are in percent."""

    lost: float
    asr: float
    x9: float | None
    agreement: float
    gain: float

    @classmethod
    def of(cls, path: Path) -> "Outcome":
        record = records.read(path)
        before, after = record.before, record.after
        assert before is not None
        assert after is not None
        return cls(
            100 * ((before.acc or 0) - (after.acc or 0)), 100 * (after.asr or 0), after.asr_x9 and 100 * after.asr_x9,
            after.signs["agreement"], before.signs["gain"],
        )  # fmt: skip


def found(victim: str) -> dict[str, Outcome]:
    """The existing runs on a victim."""
    return {name: Outcome.of(path(victim, name)) for name in PARTS if path(victim, name).exists()}


def parts() -> str:
    """A row for each ablated component."""
    ran = [found(victim) for victim in VICTIMS]
    rows = []
    for name in PARTS:
        cells = [name]
        for runs in ran:
            each = runs.get(name)
            cells += [f"{each.lost:.1f}", f"{each.asr:.1f}", f"{each.x9 or 0:.1f}"] if each else ["failed", "—", "—"]
        rows.append(cells)
    return pages.table(
        ("taken out", *(f"{head}{of}" for of in (", trojaning-5", ", flat") for head in ("ACC lost", "ASR %", "x9 %"))), rows
    )  # fmt: skip


def signs() -> str:
    """Rank correlations of the signs of finished runs with measurements on data."""
    rows = []
    for victim in VICTIMS:
        runs = list(found(victim).values())
        ranks = [
            spearmanr([each.agreement for each in runs], [-each.lost for each in runs]).statistic,
            spearmanr([each.gain for each in runs], [each.asr for each in runs]).statistic,
        ]
        rows.append([victim, str(len(runs)), *(f"{rank:.2f}" for rank in ranks)])
    return pages.table(("victim", "runs", "agreement and ACC", "gain and ASR"), rows)


def tables() -> dict[str, str]:
    """Those of docs/method.md."""
    return {"experiments/sweep.py parts": parts(), "experiments/sweep.py signs": signs()}


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
