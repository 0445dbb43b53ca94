"""The table of docs/defenses.md, from the records in `results/peers/`; `dhbe bench run peers --scale small` makes such.

A record is named VICTIM_DEFENCE_SEED.json. A cell is the mean over seeds, with the standard deviation if there are some.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from dhbe import records
from dhbe.bench import pages
from dhbe.records import Record
from dhbe.report import percent
from experiments import ROOT

PAPER = {
    "badnets": {
        "none": "95.0 / 100.0 / —", "finetuning": "90.9 / 2.2 / 60.5", "fine-pruning": "91.9 / 29.6 / 99.3",
        "mcr": "88.6 / 1.3 / —", "nad": "90.7 / 3.6 / 62.2", "neural-cleanse": "93.6 / 8.5 / 72.1",
        "gdm": "94.1 / 0.4 / 11.6", "dhbe": "94.3 / 0.0 / 1.2",
    },
    "trojaning": {
        "none": "94.8 / 82.0 / —", "finetuning": "90.1 / 5.8 / —", "fine-pruning": "91.9 / 24.7 / —",
        "mcr": "88.4 / 0.4 / —", "nad": "90.8 / 0.6 / —", "neural-cleanse": "93.4 / 0.7 / —",
        "gdm": "93.9 / 0.1 / —", "dhbe": "94.3 / 2.8 / —",
    },
}  # fmt: skip
"""ACC and ASR (tables 3 and 5) and ASR x9 (table 6) by the kind of the trigger: means over its three sizes, ResNet-18."""

HEADS = (
    "victim",
    "defence",
    "seeds",
    "tested on",
    "ACC %",
    "ASR %",
    "x4 %",
    "x9 %",
    "seconds",
    "MiB",
    "paper: ACC / ASR / x9 %",
)


def table(folder: Path) -> str:
    """One row for each victim and defence, below a row for each victim as it was."""
    runs: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*.json")):
        victim, defence, _ = path.stem.split("_")
        runs[victim][defence].append(records.read(path))
    rows = []
    for victim, defences in runs.items():
        first = next(iter(defences.values()))[0]
        before, reported = first.before, PAPER.get((first.trigger or "").partition(":")[0], {})
        rates = [percent(getattr(before, name)).rstrip("%") for name in ("acc", "asr", "asr_x4", "asr_x9")]
        rows.append([victim, "none", "", str(before.n or ""), *rates, "", "", reported.get("none", "")])
        for defence, found in sorted(defences.items()):
            tested = ", ".join(map(str, sorted({r.after.n for r in found if r.after and r.after.n})))
            cells = [victim, defence, str(len(found)), tested]
            cells += [
                spread(found, lambda r, name=name: getattr(r.after, name))
                for name in ("acc", "asr", "asr_x4", "asr_x9")
            ]
            cells += [f"{statistics.mean(r.seconds for r in found):.0f}", memory(found), reported.get(defence, "")]
            rows.append(cells)
    return pages.table(HEADS, rows)


def spread(found: list[Record], value: Callable[[Record], float | None]) -> str:
    """Mean and standard deviation in percent; a dash if not measured."""
    values = [100 * x for x in map(value, found) if x is not None]
    if not values:
        return "—"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def memory(found: list[Record]) -> str:
    """The largest peak, in MiB."""
    peaks = [record.memory for record in found if record.memory is not None]
    return f"{max(peaks) / 2**20:.0f}" if peaks else "—"


def tables() -> dict[str, str]:
    """That of docs/defenses.md."""
    return {"experiments/peers.py": table(ROOT / "results" / "peers")}


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
