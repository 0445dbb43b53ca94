"""The result of a scan in SARIF 2.1.0, an OASIS standard for the findings of analysis tools."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from urllib.parse import quote

from dhbe.records import Record

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

RULE = "backdoor"

LEVELS = {"backdoored": "error", "unclear": "warning", "label contradicted": "warning"}
"""SARIF level by verdict; other verdicts give no result."""


def log(record: Record) -> str:
    """The record of a scan as a SARIF log, JSON text.

    Args:
        record: Record of a scan.
    """
    driver = {
        "name": "dhbe",
        "version": _version(),
        "rules": [
            {
                "id": RULE,
                "name": "BackdooredClassifier",
                "shortDescription": {"text": "The image classifier responds to a hidden trigger."},
                "help": {"text": "Run dhbe erase on the model, or obtain it from a trusted source."},
                "properties": {"tags": ["security"]},
            }
        ],
    }
    run = {
        "tool": {"driver": driver},
        "artifacts": [_artifact(record)],
        "invocations": [{"executionSuccessful": True, "endTimeUtc": record.finished.replace("+00:00", "Z")}],
        "results": [_result(record)] if record.verdict in LEVELS else [],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _result(record: Record) -> dict[str, object]:
    assert record.before is not None
    assert record.verdict is not None
    signs = record.before.signs
    label = int(signs["suspected_class"])
    return {
        "ruleId": RULE,
        "ruleIndex": 0,
        "level": LEVELS[record.verdict],
        "message": {
            "text": f"{record.verdict}: {record.doubt}."
            if record.doubt
            else f"{record.verdict}: class {label} stands out with index {signs['anomaly_index']:.1f} "
            f"(probability {signs['probability']:.0%} if half of all models are backdoored)."
        },
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": _address(record), "index": 0}}}],
        "properties": {"class": label, "index": signs["anomaly_index"], "probability": signs["probability"]},
    }


def _artifact(record: Record) -> dict[str, object]:
    artifact: dict[str, object] = {"location": {"uri": _address(record)}}
    if record.model.sha256:
        artifact["hashes"] = {"sha-256": record.model.sha256}
    return artifact


def _address(record: Record) -> str:
    """The model's file as a URI reference, relative if its path is."""
    path = PurePath(record.model.path or "model").as_posix()
    return ("file://" if path.startswith("/") else "") + quote(path)


def _version() -> str:
    try:
        return version("dhbe")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"
