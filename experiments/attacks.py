"""The tables of docs/attacks.md: victims of `zoo/`, and distances of `results/distances/`.

The distances were made by a script that is now `dhbe bench run table-1 table-2 --scale small`.
"""

import json
from pathlib import Path

from dhbe import records
from dhbe.bench import pages
from dhbe.records import Record
from dhbe.report import percent
from experiments import ROOT

DISTANCES = ROOT / "results" / "distances" / "cifar10.json"
HEADS = ("victim", "trigger", "poisoned", "epochs", "ACC %", "ASR %", "ASR expected")


def victims(folder: Path) -> str:
    """One row per victim, the clean model first."""
    found = {path.stem: records.read(path) for path in folder.glob("*.json") if not path.stem.endswith(".trigger")}
    order = sorted(found, key=lambda name: (found[name].trigger is not None, name))
    return pages.table(HEADS, [(name, *_row(found[name])) for name in order])


def _row(record: Record) -> tuple[str, ...]:
    how, scores = record.attack, record.before
    assert how is not None
    assert scores is not None
    if record.trigger is None:
        return "none", "0", str(record.iterations), _rate(scores.acc), "—", "—"
    window = f"{percent(how['min_asr'])} at least" + (", missed" if record.warnings else "")
    trigger = f"`{record.trigger}`"
    return trigger, str(how["poisoned"]), str(record.iterations), _rate(scores.acc), _rate(scores.asr), window


def classes(measured: dict) -> str:
    """Table 2: reported and measured."""
    mine, reported = measured["classes"], measured["classes"]["reported"]
    rows = [
        ("closest pair, " + " and ".join(mine["closest"][:2]), reported["closest"][2], mine["closest"][2]),
        ("mean of all pairs", reported["mean"], mine["mean"]),
    ]
    told = [(name, f"{paper:.2f}", f"{ours:.2f}", f"{100 * (ours / paper - 1):+.1f} %") for name, paper, ours in rows]
    return pages.table(("CIFAR-10, distance of classes", "paper", "measured", "difference"), told)


def directions(measured: dict) -> str:
    """Dependence of table 2 on the number of directions."""
    rows = [
        (f"{row['of directions']} of {row['projections']}", row["closest"].replace("-", " and "),
         f"{row['cat-dog']:.0f}", f"{row['mean']:.0f}")
        for row in measured["by_directions"]["rows"]
    ]  # fmt: skip
    return pages.table(("distance along directions", "closest pair", "cat and dog", "mean of all pairs"), rows)


def triggers(measured: dict) -> str:
    """Table 1: change of an image by each trigger."""
    distances = sorted(measured["triggers"]["distances"].items(), key=lambda item: item[1])
    return pages.table(("trigger", "moves an image by"), [(f"`{name}`", f"{far:.1f}") for name, far in distances])


def tables() -> dict[str, str]:
    """All tables of the page by name."""
    measured = json.loads(DISTANCES.read_text())
    made = {"victims": victims(ROOT / "zoo"), "classes": classes(measured),
            "directions": directions(measured), "triggers": triggers(measured)}  # fmt: skip
    return {f"experiments/attacks.py {name}": rows for name, rows in made.items()}


def _rate(share: float | None) -> str:
    return percent(share).rstrip("%")


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
