"""`dhbe defend`: what is lent, what measures, and what lies in the folder afterwards."""

import json

import pytest
from conftest import colours, listing, packed

from dhbe import records
from dhbe.api import costing, running
from dhbe.defenses import PEERS, Defense

TUNED = "--epochs 1 --size 16 --batch 8 --quiet"
MODEL = "model.pt --input 3x16x16"
KNOWN = "--data data.npz --trigger badnets:3 --target 2"


def test_the_folder_holds_what_an_erasure_leaves(here, dhbe):
    code, said, _ = dhbe(f"defend finetuning {MODEL} {KNOWN} {TUNED} --out out --images 30 --json")
    assert code == 0
    assert sorted(listing("out")) == ["clean.pt", "clean.safetensors", "record.json", "report.html"]
    record = records.read(here / "out" / "record.json")
    assert json.loads(said)["after"]["acc"] == record.after.acc
    settings = record.defense
    assert (settings["name"], settings["clean"], settings["images"]) == ("finetuning", "data.npz", 30)
    fields = {"epochs": 1, "size": 16, "batch": 8, "lr": 0.01, "momentum": 0.9, "crop": 4, "flip": True}
    assert settings.items() >= fields.items()
    assert PEERS["finetuning"](**{name: settings[name] for name in fields}).epochs == 1
    assert record.after.n == 12, "a fifth of the 60 images measures"
    assert record.memory > 2**20
    assert "finetuning" in (here / "out" / "report.html").read_text()


@pytest.fixture
def handed(monkeypatch):
    """What the defence was handed, instead of a run."""
    seen = []

    def call(self, victim, known, **more):
        seen.append(known)
        raise KeyboardInterrupt

    monkeypatch.setattr(Defense, "__call__", call)
    return seen


def rows(images):
    return {row.tobytes() for row in images.pixels.flatten(1).numpy()}


def test_what_is_lent_never_measures(here, dhbe, handed, monkeypatch):
    measured = []
    monkeypatch.setattr(
        running, "measured", lambda model, evidence, *more: measured.append(evidence) or records.Measures()
    )
    (here / "other.npz").write_bytes(packed(**colours(count=30, side=16)))
    for command, lent, shown in (
        (KNOWN, 48, 12),
        (f"{KNOWN} --clean data.npz", 48, 12),
        (f"{KNOWN} --clean other.npz", 30, 60),
    ):
        assert dhbe(f"defend nad {MODEL} {command} --quiet --overwrite")[0] == 130
        assert len(handed[-1].clean) == lent
        assert len(measured[-1].images) == shown
    assert not rows(handed[0].clean) & rows(measured[0].images)


def test_a_defence_gets_what_it_needs_and_no_more(here, dhbe, handed):
    for name, kind in PEERS.items():
        assert dhbe(f"defend {name} {MODEL} {KNOWN} --quiet --images 20")[0] == 130
        assert (handed[-1].clean is not None) == ("clean images" in kind.needs)
        assert (handed[-1].target is not None) == ("target class" in kind.needs)


def test_a_defence_that_needs_nothing_runs_without_data(here, dhbe):
    assert dhbe(f"defend clp {MODEL} --u 1 --quiet --out out")[0] == 0
    record = records.read(here / "out" / "record.json")
    assert record.after.acc is None
    assert record.defense == {"name": "clp", "u": 1.0}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("defend nothing model.pt", "no defence 'nothing'; available: finetuning, "),
        (f"defend finetuning {MODEL}", "finetuning needs clean images: give --data or --clean"),
        (f"defend finetuning {MODEL} --data data.npz --epochs 0", "--epochs 0: it must be a number of at least 1"),
        (
            f"defend finetuning {MODEL} --data data.npz --images 3 --out out",
            "finetuning needs at least 8 clean images, not 3",
        ),
        (f"defend clp {MODEL} --max-asr .1", "--max-asr needs --data, --trigger and --target"),
        (f"defend clp {MODEL} --data data.npz --trigger badnets:3", "give both --trigger and --target"),
    ],
)
def test_misuse_is_one_line(here, dhbe, command, said):
    code, shown, errors = dhbe(f"{command} --quiet")
    assert (code, shown) == (2, "")
    assert sum(not line.startswith("note: ") for line in errors.splitlines()) == 1
    assert said in errors
    assert not (here / "out").exists()


def test_another_defence_in_the_same_folder_is_refused_and_the_same_one_recognised(here, dhbe):
    command = f"{MODEL} {KNOWN} {TUNED} --out out --resume"
    assert dhbe(f"defend finetuning {command}")[0] == 0
    before = listing("out")
    assert dhbe(f"defend finetuning {command}")[0] == 0
    code, _, errors = dhbe(f"defend finetuning {command} --images 20")
    assert (code, "finished run with other settings (images: 48 then, 20 now" in errors) == (2, True)
    code, _, errors = dhbe(f"defend nad {command}")
    assert (code, "finished run with other settings" in errors) == (2, True)
    assert listing("out") == before


def test_help_lists_every_defence_with_its_needs(dhbe):
    code, said, _ = dhbe("defend --help")
    assert code == 0
    for name in PEERS:
        assert f"{name} " in said
        assert dhbe(f"defend {name} --help")[0] == 0


def test_what_neural_cleanse_found_is_told(here, dhbe):
    search = "--search-epochs 1 --search-size 8 --search-batch 8 --epochs 1 --size 16 --batch 8 --index 1e6 --quiet"
    code, said, _ = dhbe(f"defend neural-cleanse {MODEL} {KNOWN} {search} --out out")
    assert code == 0
    found = records.read(here / "out" / "record.json").before.signs
    assert found.keys() == {"anomaly_index", "suspected_class"}
    assert found["suspected_class"] in (0, 1, 2)
    assert "suspected_class" in said
    page = (here / "out" / "report.html").read_text()
    assert "suspected_class" in page
    assert "How the two models differ on generated images" not in page


def test_a_comparison_says_what_each_defence_costs_and_asks_above_an_hour(here, dhbe, handed, monkeypatch):
    monkeypatch.setattr(costing, "_timed", lambda *_: (10.0, 1.0))  # seconds for an image, and its bytes
    code, _, said = dhbe(f"compare {MODEL} --defenses clp fast --out out")
    assert (code, handed, (here / "out").exists()) == (2, [], False)
    assert "dhbe: fast would take" in said
    assert "add --yes" in said
    dhbe(f"compare {MODEL} --defenses clp fast --out out --yes")
    assert handed, "it ran"
