"""Prints README's table from the records in `results/erasures/`; with --check, fails if README shows another one."""

import sys
from collections.abc import Callable
from pathlib import Path

from dhbe import records
from dhbe.records import Measures, Record
from dhbe.report import percent

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- table: benchmarks/table.py -->", "<!-- end of table -->"


def table(folder: Path) -> str:
    """A row for each victim, in the order of their names: the worst of what its seeds came to."""
    victims: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.json")):
        victims.setdefault(path.stem.rpartition("_")[0], []).append(records.read(path))
    rows = [
        "| model | seeds | accuracy | lost | ASR | ASR x9 | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for victim, found in victims.items():
        both = [(each.before, each.after) for each in found if each.before and each.after]
        lost = max((before.acc or 0) - (after.acc or 0) for before, after in both)
        cells = [
            victim,
            str(len(found)),
            worst(both, "acc", min),
            f"{100 * lost:.1f}",
            worst(both, "asr"),
            worst(both, "asr_x9"),
        ]
        rows.append("| " + " | ".join([*cells, f"{max(each.seconds for each in found):.0f}"]) + " |")
    return "\n".join(rows)


def worst(both: list[tuple[Measures, Measures]], rate: str, of: Callable[..., float] = max) -> str:
    """A rate before, and the worst after; a dash where none was measured."""
    rates = [(getattr(before, rate), getattr(after, rate)) for before, after in both]
    known = [(before, after) for before, after in rates if before is not None and after is not None]
    if not known:
        return "—"
    return f"{percent(of(before for before, _ in known))} to {percent(of(after for _, after in known))}"


def shown(readme: str) -> str:
    """The table that README shows."""
    return readme.partition(START)[2].partition(END)[0].strip()


if __name__ == "__main__":
    rows = table(ROOT / "results" / "erasures")
    if "--check" not in sys.argv:
        print(rows)
    elif shown((ROOT / "README.md").read_text()) != rows:
        sys.exit("README's table is not what results/erasures/ gives: run python benchmarks/table.py")
