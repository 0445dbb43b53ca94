"""The one way to run what has no record yet."""

from collections.abc import Callable, Iterable
from pathlib import Path

from dhbe import records
from dhbe.errors import Failed
from dhbe.records import Record
from experiments import victims

Case = tuple[str, Callable[[], Record]]
"""The name of a record's file, and what makes the record."""


def run(cases: Iterable[Case], folder: Path, *, brief: bool = True) -> None:
    """Runs each case that has no record in a folder, and writes it there; one that fails is told of and leaves none.

    Args:
        cases: In their order; what makes a record is called only where there is none.
        folder: It is made if it is not there.
        brief: Leave out curves, and warnings, which name files of this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in cases:
        out = folder / f"{name}.json"
        if out.exists():
            continue
        try:
            record = victims.without_paths(make())
        except Failed as failure:
            print(f"{name}: {failure}", flush=True)
            continue
        records.write(out, record.model_copy(update={"curve": [], "warnings": []}) if brief else record)
        print(f"{name}: {told(record)}; {record.seconds:.0f} s", flush=True)


def told(record: Record) -> str:
    """What a record came to, in a line."""
    if record.after is None:
        return record.verdict or "done"
    before = record.before or record.after
    rates = [(getattr(before, name), getattr(record.after, name)) for name in ("acc", "asr", "asr_x9")]
    return ", ".join(f"{old:.4f} to {new:.4f}" for old, new in rates if old is not None and new is not None)
