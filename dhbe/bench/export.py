"""Exports all records as one table."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from dhbe import files
from dhbe.bench.drawing import RATES, Result
from dhbe.bench.store import CaseRecord, read
from dhbe.errors import Refused

VALUES = (*RATES, "lost", "mib")


def write(file: Path, records: Path) -> int:
    """Writes a row for each record and returns their number.

    Args:
        file: A file ending in `.csv`, or `.parquet`, which needs pyarrow.
        records: Folder of one scale's records.

    Raises:
        Refused: There are no records, the suffix is unknown, or pyarrow is not installed.
        Failed: The file cannot be written.
    """
    rows = [row(path.stem, read(path)) for path in sorted(records.glob("*.json"))]
    if not rows:
        raise Refused(f"no records in {records}: make some with dhbe bench run")
    heads = list(dict.fromkeys(name for each in rows for name in each))
    if file.suffix == ".csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.write(file, out.getvalue())
    elif file.suffix == ".parquet":
        files.write(file, _parquet(heads, rows))
    else:
        raise Refused(f"{file}: give a name that ends in .csv or .parquet")
    return len(rows)


def row(stem: str, record: CaseRecord) -> dict[str, Any]:
    """One record as a flat row: rates in percent, settings as JSON."""
    result = Result({}, record, stem)
    run = record.record
    told = {
        "case": stem, "id": record.id, "work": record.work, "code": record.code, "error": record.error,
        "attack": run.attack["name"] if run and run.attack else None,
        "defense": record.settings.get("defense"), "data": run.data if run else record.settings.get("data"),
        "arch": run.model.arch if run else None, "trigger": run.trigger if run else None, "seed": record.settings.get("seed"),
        "verdict": run.verdict if run else None,
    }  # fmt: skip
    told |= {name: result.value(name) for name in VALUES}
    told |= {"acc_before": None, "asr_before": None}
    if run and run.kind == "erase" and run.before:
        rates = (run.before.acc, run.before.asr)
        told |= dict(zip(("acc_before", "asr_before"), (None if x is None else 100 * x for x in rates), strict=True))
    return told | {
        "seconds": record.seconds, "device": record.device, "finished": record.finished,
        "commit": record.versions.get("commit"), "torch": record.versions.get("torch"),
        "settings": json.dumps(record.settings, sort_keys=True), "found": json.dumps(record.found, sort_keys=True),
    }  # fmt: skip


def _parquet(heads: list[str], rows: list[dict[str, Any]]) -> bytes:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise Refused("a .parquet file needs pyarrow: pip install 'dhbe[parquet]', or give a .csv") from error
    out = io.BytesIO()
    parquet.write_table(pa.table({name: [each.get(name) for each in rows] for name in heads}), out)
    return out.getvalue()
