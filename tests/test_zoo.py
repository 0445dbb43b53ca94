"""The victims of zoo/ are what their records say."""

import json
import os
import re
import runpy
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from dhbe import records
from dhbe.attacks import ALL
from dhbe.attacks.triggers import parse
from dhbe.errors import Failed
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
    assert [line for line in suspect.warnings if "the file's own label" not in line] == []
    assert (suspect.info.arch, suspect.info.input) == (record.model.arch, record.model.input)
    attack = ALL[record.attack["name"]]
    settings = {field.name: record.attack[field.name] for field in fields(attack) if field.name in record.attack}
    clean = records.read(ROOT / "zoo/clean.json").before
    expected = pytest.raises(Failed) if record.warnings else nullcontext()  # kept all the same, and marked
    with expected as missed:
        attack(**settings).confirm(record.before.asr, record.before.acc, clean.acc)
    assert record.warnings == ([str(missed.value)] if missed else [])
    assert str(record.model.path) == f"{name}.safetensors"
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


def test_the_builder_makes_what_is_here_and_a_victim_of_every_attack():
    how = runpy.run_path(str(ROOT / "zoo/build.py"))["VICTIMS"]
    assert set(VICTIMS) <= set(how)
    for name in VICTIMS:
        record, (attack, fit) = records.read(ROOT / f"zoo/{name}.json"), how[name]
        assert record.attack["name"] == attack.name
        for told, now in ((record.attack, asdict(attack)), (record.attack["fit"], asdict(fit))):
            assert {key: told.get(key, value) for key, value in now.items()} == now  # some settings are younger
    assert {attack.name for attack, _ in how.values()} == set(ALL)


def test_the_page_says_that_the_distances_of_classes_agree_within_5_percent():
    measured = json.loads((ROOT / "results/distances/cifar10.json").read_text())["classes"]
    reported = measured["reported"]
    assert measured["closest"][:2] == reported["closest"][:2]
    assert measured["closest"][2] == pytest.approx(reported["closest"][2], rel=0.05)
    assert measured["mean"] == pytest.approx(reported["mean"], rel=0.05)
    assert (measured["projections"], measured["draws"], len(measured["pairs"])) == (500, 12, 45)


def test_the_picture_shows_every_trigger(tmp_path):
    drawn = runpy.run_path(str(ROOT / "docs/triggers.py"))
    drawn["main"].__globals__["OUT"] = tmp_path / "triggers.png"
    drawn["main"]()
    assert (tmp_path / "triggers.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_picture_of_the_course_is_what_its_script_draws(tmp_path):
    drawn = runpy.run_path(str(ROOT / "docs/how_it_works.py"))
    drawn["main"].__globals__["OUT"] = tmp_path / "how_it_works.svg"
    drawn["main"]()
    now, committed = tmp_path / "how_it_works.svg", ROOT / "docs/how_it_works.svg"
    written = [re.findall(r"<!-- (.*?) -->", each.read_text()) for each in (now, committed)]
    assert written[0] == written[1] != []
