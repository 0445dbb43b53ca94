"""The tables of README and docs/results.md, from the records in `results/erasures/` and `results/today/`."""

from collections.abc import Callable
from pathlib import Path

from dhbe import records
from dhbe.bench import pages
from dhbe.records import Measures, Record
from dhbe.report import percent
from experiments import ROOT

HEADS = ("model", "seeds", "accuracy", "lost", "ASR", "ASR x9", "seconds")


def table(folder: Path) -> str:
    """A row for each victim, sorted by name, with the worst of its seeds."""
    victims: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.json")):
        victims.setdefault(path.stem.rpartition("_")[0], []).append(records.read(path))
    rows = []
    for victim, found in victims.items():
        both = [(each.before, each.after) for each in found if each.before and each.after]
        lost = max((before.acc or 0) - (after.acc or 0) for before, after in both)
        rates = worst(both, "acc", min), f"{100 * lost:.1f}", worst(both, "asr"), worst(both, "asr_x9")
        rows.append((victim, str(len(found)), *rates, f"{max(each.seconds for each in found):.0f}"))
    return pages.table(HEADS, rows)


def worst(both: list[tuple[Measures, Measures]], rate: str, of: Callable[..., float] = max) -> str:
    """A rate before, and the worst after; a dash if not measured."""
    rates = [(getattr(before, rate), getattr(after, rate)) for before, after in both]
    known = [(before, after) for before, after in rates if before is not None and after is not None]
    if not known:
        return "—"
    return f"{percent(of(before for before, _ in known))} to {percent(of(after for _, after in known))}"


def tables() -> dict[str, str]:
    """The tables by name."""
    results = ROOT / "results"
    return {"experiments/table.py": table(results / "erasures"), "experiments/table.py today": table(results / "today")}


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
