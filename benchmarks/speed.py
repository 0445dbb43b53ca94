"""Prints the table of docs/performance.md from the records in `results/speed/`; --check fails if it shows another one."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- table: benchmarks/speed.py -->", "<!-- end of table -->"


def table(folder: Path) -> str:
    """A row for each record of ours against a plain loop, then one for each command that was started."""
    rows = ["| record | ours, s | plain, s | ratio | of the floor | threads |", "| --- | --- | --- | --- | --- | --- |"]
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text())
        if "ratio" in told:
            cells = [path.stem, *(middle(told["seconds"][who]) for who in ("ours", "plain")), f"{told['ratio']:.2f}"]
            floor = f"{told['share_of_floor']:.0%}" if "share_of_floor" in told else "—"
            rows.append("| " + " | ".join([*cells, floor, str(told["machine"]["threads"])]) + " |")
    for path in sorted(folder.glob("startup*.json")):
        for name, found in json.loads(path.read_text())["commands"].items():
            rows.append(f"| `{name}` | {middle(found['seconds'])} | — | — | — | — |")
    return "\n".join(rows)


def middle(times: list[Any]) -> str:
    """The median of some seconds, and their range."""
    return f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})"


def shown(text: str) -> str:
    """The table that a page shows."""
    return text.partition(START)[2].partition(END)[0].strip()


if __name__ == "__main__":
    rows = table(ROOT / "results" / "speed")
    if "--check" not in sys.argv:
        print(rows)
    elif shown((ROOT / "docs" / "performance.md").read_text()) != rows:
        sys.exit("the table of docs/performance.md is not what results/speed gives: run python benchmarks/speed.py")
