"""Output: results go to stdout, everything else to stderr."""

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
    """Prints one line on stderr and returns the given exit code."""
    print(f"dhbe: {foreign.line(error)}", file=sys.stderr)
    return code


def tell(args: argparse.Namespace, line: str) -> None:
    """Prints a line of progress on stderr, unless `--quiet`."""
    if not args.quiet:
        print(foreign.line(line), file=sys.stderr, flush=True)


def option(name: str, value: object) -> str:
    """A setting as a command-line option."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def notes(args: argparse.Namespace, lines: Iterable[str]) -> None:
    """Prints notes about a model, data or a run, each line once, even with `--quiet`."""
    told = vars(args).setdefault("told", set())
    for line in lines:
        if line not in told:
            told.add(line)
            print(f"note: {foreign.line(line)}", file=sys.stderr, flush=True)


def show(args: argparse.Namespace, content: dict[str, Any], text: Callable[[], str]) -> None:
    """Prints the result on stdout: as JSON with `--json`, else as text."""
    encoding = sys.stdout.encoding or "utf-8"  # it may not cover file names
    said = json.dumps(content) if args.json else "\n".join(map(foreign.harmless, text().split("\n")))
    print(said.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def rates(columns: "dict[str, Measures]") -> str:
    """A table of rates, with a column for each state of a model."""
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
    """The keys with which the JSON of every verb begins.

    Args:
        kind: The kind of run, as in records.
        verdict: The run's verdict; None if it has none.
        said: The result in one line.
        sha256: SHA-256 of the model's file.
        record: Path of the record, if there is one.
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
    """Prints the result of a run with a record: a table, the verdict, and the path of the report."""
    from dhbe.report import line

    said = line(record)
    content = record.model_dump(mode="json", exclude={"curve"}) if content is None else content
    told = envelope(record.kind, record.verdict, said, record.model.sha256, out / "record.json")
    more = f"{record.iterations} rounds, {record.seconds:.0f} s; see {foreign.name(out / 'report.html')}"
    show(args, {**told, **content}, lambda: "\n".join([*table(), said, more]))


def erased(args: argparse.Namespace, record: "Record", out: Path) -> None:
    """Prints the result of a defence."""
    before, after = record.before, record.after
    assert before is not None
    assert after is not None
    columns = {"suspect": before, "cleaned": after}
    recorded(args, record, out, lambda: [*([rates(columns)] if record.data else []), *signs(columns)])


def signs(columns: "dict[str, Measures]") -> list[str]:
    """The data-free signs, one per line, with a column for each state of a model."""
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
