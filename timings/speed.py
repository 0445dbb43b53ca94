"""Prints the table of docs/performance.md from the records in `results/speed/`; --check fails if it shows another one."""

import json
import statistics
from pathlib import Path
from typing import Any

from dhbe.bench import pages
from experiments import ROOT

HEADS = ("record", "ours, s", "plain, s", "ratio", "of the floor", "threads")


def table(folder: Path) -> str:
    """A row for each record of ours against a plain loop, then one for each command that was started."""
    rows = list[tuple[str, ...]]()
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text())
        if "ratio" in told:
            times = (middle(told["seconds"][who]) for who in ("ours", "plain"))
            floor = f"{told['share_of_floor']:.0%}" if "share_of_floor" in told else "—"
            rows.append((path.stem, *times, f"{told['ratio']:.2f}", floor, str(told["machine"]["threads"])))
    for path in sorted(folder.glob("startup*.json")):
        for name, found in json.loads(path.read_text())["commands"].items():
            rows.append((f"`{name}`", middle(found["seconds"]), *"————"))
    return pages.table(HEADS, rows)


def middle(times: list[Any]) -> str:
    """The median of some seconds, and their range."""
    return f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})"


def tables() -> dict[str, str]:
    """That of docs/performance.md."""
    return {"timings/speed.py": table(ROOT / "results" / "speed")}


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
