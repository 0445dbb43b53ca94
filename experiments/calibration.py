"""Evaluates the threshold of `dhbe scan`, fitted on one half of a set of small classifiers, on the other half.

The records in `results/calibration/` are of the classifiers that `dhbe bench run calibration --scale small` trains and
scans, half of them backdoored, and of third-party ones. A victim whose ASR is below a half has no backdoor to find, and
is left out.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from dhbe import records
from dhbe.bench import pages
from experiments import ROOT

HEADS = ("classifier", "half", "index", "class found", "target")
RESULTS = ROOT / "results" / "calibration"


@dataclass(frozen=True)
class Seen:
    """One classifier of the set, as it was scanned."""

    name: str
    index: float
    suspect: int
    target: int | None

    @classmethod
    def of(cls, path: Path) -> "Seen | None":
        """From its record; None for a victim whose backdoor did not take."""
        record = records.read(path)
        assert record.before is not None
        if record.after is not None and record.after.asr is not None and record.after.asr < 0.5:
            return None
        signs = record.before.signs
        return cls(path.stem, signs["anomaly_index"], int(signs["suspected_class"]), record.target)


def seen(folder: Path) -> tuple[list[Seen], list[Seen]]:
    """The two halves: every other of the sorted names of each kind is for fitting, the rest for evaluation."""
    found = [each for path in sorted(folder.glob("*.json")) if (each := Seen.of(path))]
    sides = [[each for each in found if (each.target is not None) == planted] for planted in (False, True)]
    fitting, judging = ([each for side in sides for each in side[first::2]] for first in (0, 1))
    return fitting, judging


def table(folder: Path) -> str:
    """All classifiers, and the evaluation of the fitted threshold on the other half."""
    fitting, judging = seen(folder)
    threshold, (middle, slope) = best_threshold(fitting), curve(fitting)
    truth, indices = [each.target is not None for each in judging], [each.index for each in judging]
    accused = [each for each in judging if each.index > threshold]
    hits = [each for each in accused if each.target is not None]
    right = sum(each.suspect == each.target for each in hits)
    rows = []
    for each in sorted([*fitting, *judging], key=lambda each: -each.index):
        half, target = "judged" if each in judging else "fitted", "none" if each.target is None else str(each.target)
        rows.append((each.name.replace("_", " "), half, f"{each.index:.1f}", str(each.suspect), target))
    return "\n".join(
        [
            f"Of one half ({len(fitting)} classifiers): threshold {threshold:.1f}, even odds at {middle:.1f}, slope {slope:.1f}.",
            f"Of the other ({len(judging)}): AUROC {roc_auc_score(truth, indices):.2f}; "
            f"{len(hits)} of {sum(truth)} backdoored ones found, the right class in {right} of them; "
            f"{len(accused) - len(hits)} of {len(judging) - sum(truth)} clean ones accused.",
            "",
            pages.table(HEADS, rows),
        ]
    )


def best_threshold(half: list[Seen]) -> float:
    """The threshold that maximises true minus false positive rate, in the middle of the gap."""
    levels = sorted(each.index for each in half)
    planted = sum(each.target is not None for each in half)

    def gain(level: float) -> float:
        over = [each.target is not None for each in half if each.index > level]
        return sum(over) / planted - (len(over) - sum(over)) / (len(half) - planted)

    return max(((low + high) / 2 for low, high in pairwise(levels)), key=gain)


def curve(half: list[Seen]) -> tuple[float, float]:
    """Middle and slope of the logistic curve in the logarithm of the index, both kinds weighted equally."""
    x = [[math.log(max(each.index, 0.1))] for each in half]
    fit = LogisticRegression(class_weight="balanced").fit(x, [each.target is not None for each in half])
    slope, offset = float(fit.coef_[0, 0]), float(fit.intercept_[0])
    return math.exp(-offset / slope), slope


def tables() -> dict[str, str]:
    """That of docs/method.md."""
    return {"experiments/calibration.py": table(RESULTS)}


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
