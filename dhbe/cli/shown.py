"""What is shown: results on stdout, everything else on stderr."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dhbe import foreign

if TYPE_CHECKING:
    from dhbe.records import Measures, Record


def said(error: object, code: int) -> int:
    """One line on stderr; returns the exit code that goes with it."""
    print(f"dhbe: {foreign.line(error)}", file=sys.stderr)
    return code


def tell(args: argparse.Namespace, line: str) -> None:
    """How it goes, on stderr."""
    if not args.quiet:
        print(foreign.line(line), file=sys.stderr, flush=True)


def option(name: str, value: object) -> str:
    """A setting as one gives it on the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def notes(args: argparse.Namespace, lines: Iterable[str]) -> None:
    """What is worth knowing about a model, data or a run, each line once; it is no progress, and `--quiet` leaves it."""
    told = vars(args).setdefault("told", set())
    for line in lines:
        if line not in told:
            told.add(line)
            print(f"note: {foreign.line(line)}", file=sys.stderr, flush=True)


def show(args: argparse.Namespace, content: dict[str, Any], text: Callable[[], str]) -> None:
    """The result on stdout: as JSON if that was asked for, else as text."""
    encoding = sys.stdout.encoding or "utf-8"  # names of files need not fit into it
    said = json.dumps(content) if args.json else "\n".join(map(foreign.harmless, text().split("\n")))
    print(said.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def rates(columns: "dict[str, Measures]") -> str:
    """A table of rates, a column for each state of a model."""
    rows = (("ACC", "acc"), ("ASR", "asr"), ("ASR x4", "asr_x4"), ("ASR x9", "asr_x9"))
    rows += (("ASR (victim right)", "asr_victim"), ("ASR (all)", "asr_all"), ("RA", "ra"), ("DER", "der"))
    lines = [f"{'':20}" + "".join(f"{head:>12}" for head in columns)]
    for name, field in rows:
        values = [getattr(measures, field) for measures in columns.values()]
        if any(value is not None for value in values):
            lines.append(f"{name:20}" + "".join(f"{'-' if v is None else f'{v:.2%}':>12}" for v in values))
    return "\n".join(lines)


def envelope(
    kind: str, verdict: str | None, said: str, sha256: str | None, record: Path | None
) -> dict[str, str | int | None]:
    """What every verb's JSON begins with.

    Args:
        kind: The verb's, as in records.
        verdict: The run's own; None if it says none.
        said: The same in a line.
        sha256: Of the model's file.
        record: Where the record lies, if there is one.
    """
    where = str(record) if record else None
    return {"kind": kind, "format": 2, "verdict": verdict, "said": said, "sha256": sha256, "record": where}


def recorded(
    args: argparse.Namespace,
    record: "Record",
    out: Path,
    table: Callable[[], list[str]],
    content: dict[str, Any] | None = None,
) -> None:
    """What a run with a record came to: lines of a table, the verdict, and where more stands."""
    from dhbe.report import line

    said = line(record)
    content = record.model_dump(mode="json", exclude={"curve"}) if content is None else content
    told = envelope(record.kind, record.verdict, said, record.model.sha256, out / "record.json")
    more = f"{record.iterations} rounds, {record.seconds:.0f} s; see {foreign.name(out / 'report.html')}"
    show(args, {**told, **content}, lambda: "\n".join([*table(), said, more]))


def erased(args: argparse.Namespace, record: "Record", out: Path) -> None:
    """What a run of a defence came to."""
    before, after = record.before, record.after
    assert before is not None
    assert after is not None
    columns = {"suspect": before, "cleaned": after}
    recorded(args, record, out, lambda: [*([rates(columns)] if record.data else []), *signs(columns)])


def signs(columns: "dict[str, Measures]") -> list[str]:
    """The data-free signs, a line each, with a column for each state of a model."""
    states = list(columns.values())
    from dhbe.report.names import placed

    told = placed([state.signs for state in states])
    names = dict.fromkeys(name for each in told for name in each)
    width = max(20, *(len(name) + 1 for name in names)) if names else 20
    lines = [f"{'':{width}}" + "".join(f"{head:>12}" for head in columns)]
    for name in names:
        values = [each.get(name) for each in told]
        lines.append(f"{name:{width}}" + "".join(f"{'-' if v is None else f'{v:.3f}':>12}" for v in values))
    return lines
