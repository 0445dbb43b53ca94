"""Accuracy, attack success and time of presets and settings, and their Pareto front.

    python -m experiments.pareto         # the table of docs/performance.md, from results/pareto/
    python -m experiments.pareto plot    # docs/pareto.png

The records are of victims of `zoo/`, all 10,000 test images of CIFAR-10 measuring; `dhbe bench run pareto --scale small`
makes such of victims of its own. The exact presets run for about as long as `fast` does: at their full length they take a
day here.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from dhbe import records
from dhbe.bench import pages
from dhbe.bench.experiments.pareto import SETTINGS
from dhbe.records import Record
from experiments import ROOT

RESULTS = ROOT / "results" / "pareto"
PLOT = ROOT / "docs" / "pareto.png"
VICTIMS = ("badnets-3", "trojaning-5")
MOST = 4.0
"""Upper limit of the plot in points of accuracy lost; runs above it failed."""


def path(victim: str, name: str) -> Path:
    """The path of a record."""
    return RESULTS / f"{victim}_{name.replace(' ', '-').replace(',', '').replace('/', '-of-')}.json"


@dataclass(frozen=True)
class Outcome:
    """One run: seconds, and rates in percent."""

    seconds: float
    lost: float
    asr: float

    @classmethod
    def of(cls, record: Record) -> "Outcome":
        before, after = record.before, record.after
        assert before is not None
        assert after is not None
        return cls(record.seconds, 100 * ((before.acc or 0) - (after.acc or 0)), 100 * (after.asr or 0))

    def beats(self, other: "Outcome") -> bool:
        """Whether it is nowhere worse and somewhere better than another."""
        both = [(getattr(self, name), getattr(other, name)) for name in ("seconds", "lost", "asr")]
        return all(mine <= its for mine, its in both) and any(mine < its for mine, its in both)


def outcomes(victim: str) -> dict[str, Outcome]:
    """The existing runs on a victim."""
    there = {name: path(victim, name) for name in SETTINGS}
    return {name: Outcome.of(records.read(file)) for name, file in there.items() if file.exists()}


def front(runs: dict[str, Outcome]) -> set[str]:
    """The runs on the Pareto front."""
    return {name for name, run in runs.items() if not any(other.beats(run) for other in runs.values())}


def table() -> str:
    """A row for each setting; those on the Pareto front are in bold."""
    rows, ran = [], {victim: outcomes(victim) for victim in VICTIMS}
    for name in SETTINGS:
        cells = [f"`{name}`"]
        for runs in ran.values():
            run, bold = runs.get(name), "**" if name in front(runs) else ""
            cells += (
                [f"{bold}{x}{bold}" for x in (f"{run.seconds:.0f}", f"{run.lost:.1f}", f"{run.asr:.1f}")]
                if run
                else "———"
            )
        rows.append(cells)
    heads = (f"{victim}: {head}" for victim in VICTIMS for head in ("s", "ACC lost", "ASR %"))
    return pages.table(("setting", *heads), rows)


def plot() -> None:
    """Plots ACC lost over seconds with ASR as colour; settings are numbered, and runs off the scale are on the upper edge."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(VICTIMS), figsize=(11, 4.4), layout="constrained")
    for axis, victim in zip(axes, VICTIMS, strict=True):
        runs = outcomes(victim)
        best = front(runs)
        for number, name in enumerate(SETTINGS, 1):
            run, kept = runs[name], name in best
            drawn = axis.scatter(
                run.seconds, min(run.lost, MOST), c=[run.asr], vmin=0, vmax=10, cmap="viridis_r", s=90 if kept else 30,
                edgecolors="black" if kept else "none", marker="^" if run.lost > MOST else "o", clip_on=False,
            )  # fmt: skip
            told = f"{number}: {run.lost:.0f} lost" if run.lost > MOST else str(number)
            beside = (-8, 14 * (8 - number)) if run.lost > MOST else (7, 2 if number % 2 else -10)
            axis.annotate(
                told, (run.seconds, min(run.lost, MOST)), xytext=beside, textcoords="offset points", fontsize=9,
                ha="right" if run.lost > MOST else "left",
            )  # fmt: skip
        axis.set(title=victim, xlabel="seconds", ylabel="points of accuracy lost", ylim=(0, MOST), xlim=(50, 230))
    figure.colorbar(drawn, ax=axes, label="ASR in %, 10 and more", extend="max")
    listed = [f"{number} {name}" for number, name in enumerate(SETTINGS, 1)]
    lines = ["    ".join(listed[first : first + 5]) for first in range(0, len(listed), 5)]
    figure.supxlabel("\n".join(lines), fontsize=9)
    figure.savefig(PLOT, dpi=110)


def tables() -> dict[str, str]:
    """That of docs/performance.md."""
    return {"experiments/pareto.py": table()}


if __name__ == "__main__":
    if "plot" in sys.argv[1:]:
        plot()
    else:
        print("\n\n".join(tables().values()))
