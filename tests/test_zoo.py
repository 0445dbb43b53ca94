"""The victims of zoo/ are what their records say."""

import json
import os
import runpy
from dataclasses import fields
from pathlib import Path

import pytest

from dhbe import records
from dhbe.attacks import ALL
from dhbe.attacks.triggers import parse
from dhbe.files import sha256
from dhbe.suspects import load

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("DHBE_SHARED", ROOT.parent / "shared")) / "data"
VICTIMS = sorted(path.stem for path in (ROOT / "zoo").glob("*.json") if not path.stem.endswith(".trigger"))


@pytest.mark.parametrize("name", VICTIMS)
def test_a_victim_is_whole_small_and_within_its_window(name):
    record = records.read(ROOT / f"zoo/{name}.json")
    model = ROOT / f"zoo/{name}.safetensors"
    assert model.stat().st_size < 10**6
    assert record.model.sha256 == sha256(model)
    suspect = load(model)
    assert suspect.warnings == ()
    assert (suspect.info.arch, suspect.info.input) == (record.model.arch, record.model.input)
    attack = ALL[record.attack["name"]]
    settings = {field.name: record.attack[field.name] for field in fields(attack)}
    clean = records.read(ROOT / "zoo/clean.json").before
    attack(**settings).confirm(record.before.asr, record.before.acc, clean.acc)
    assert record.warnings == []
    if record.trigger:
        assert parse(str(ROOT / f"zoo/{name}.trigger.json"), record.model.input).name == record.trigger


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")
@pytest.mark.parametrize("name", VICTIMS)
def test_a_victim_scores_as_its_record_says(name, dhbe, monkeypatch):
    monkeypatch.setenv("DHBE_DATA", str(SHARED))
    record = records.read(ROOT / f"zoo/{name}.json")
    trigger = f"--trigger {ROOT}/zoo/{name}.trigger.json --target {record.target}" if record.trigger else ""
    code, out, _ = dhbe(f"score {ROOT}/zoo/{name}.safetensors --data cifar10 {trigger} --json")
    scores = json.loads(out)
    assert code == 0
    assert scores["acc"] == pytest.approx(record.before.acc, abs=5e-4)
    assert scores["asr"] == (record.before.asr and pytest.approx(record.before.asr, abs=5e-4))


def test_the_picture_shows_every_trigger(tmp_path):
    drawn = runpy.run_path(str(ROOT / "docs/triggers.py"))
    drawn["main"].__globals__["OUT"] = tmp_path / "triggers.png"
    drawn["main"]()
    assert (tmp_path / "triggers.png").read_bytes().startswith(b"\x89PNG")
