"""Prints README's table from the records in `results/`; with --check, fails if README shows another one."""

import sys
from pathlib import Path

from dhbe import records
from dhbe.report import percent

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- table: benchmarks/table.py -->", "<!-- end of table -->"


def table(folder: Path) -> str:
    """The erasures among the records, one a row, in the order of their file names."""
    rows = ["| model | accuracy | ASR | ASR x9 | seconds |", "| --- | --- | --- | --- | --- |"]
    for path in sorted(folder.glob("*.json")):
        record = records.read(path)
        before, after = record.before, record.after
        if record.kind != "erase" or before is None or after is None:
            continue
        cells = [
            path.stem.replace("_", " "),
            *(f"{percent(getattr(before, f))} to {percent(getattr(after, f))}" for f in ("acc", "asr", "asr_x9")),
        ]
        rows.append("| " + " | ".join([*cells, f"{record.seconds:.0f}"]).replace("— to —", "—") + " |")
    return "\n".join(rows)


def shown(readme: str) -> str:
    """The table that README shows."""
    return readme.partition(START)[2].partition(END)[0].strip()


if __name__ == "__main__":
    rows = table(ROOT / "results")
    if "--check" not in sys.argv:
        print(rows)
    elif shown((ROOT / "README.md").read_text()) != rows:
        sys.exit("README's table is not what results/ gives: run python benchmarks/table.py")
