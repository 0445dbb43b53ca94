import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dhbe import records
from dhbe.errors import Failed, Refused
from dhbe.records import Battery, FormRates, Measures, ModelInfo, Reactivation, Record, Relearning


def example(**changes) -> Record:
    fields = {
        "kind": "erase",
        "model": ModelInfo(
            path="victim.pt",
            sha256="0" * 64,
            arch="resnet8",
            classes=10,
            input=(3, 32, 32),
            mean=(0.5,),
            std=(0.25,),
        ),
        "defense": {"name": "dhbe", "alpha": 0.5, "places": "sample", "dropout": False},
        "before": Measures(acc=0.99, asr=1.0, n=360, asr_n=320, signs={"reaction": 18.0}),
        "after": Measures(acc=0.98, asr=0.0, n=360, asr_n=316, signs={"agreement": 0.97}),
        "seconds": 12.5,
        "device": "cpu",
        "precision": "fp32",
        "seed": 0,
        "curve": [{"iteration": 0, "bn_loss": 3.5}, {"iteration": 1, "distillation": 0.25}],
        "finished": "2025-01-31T12:00:00+00:00",
    }
    return Record(**(fields | changes))


def broken(content: dict, *path, value) -> str:
    *folders, last = path
    inner = content
    for key in folders:
        inner = inner[key]
    inner[last] = value
    return json.dumps(content)


text = st.text(st.characters(), max_size=20)  # lone surrogates too: file names hold them
number = st.floats(allow_nan=False, allow_infinity=False)
fraction = st.none() | st.floats(0, 1)
plain = st.recursive(st.none() | st.booleans() | st.integers(-(2**60), 2**60) | number | text, st.lists, max_leaves=5)
measures = st.builds(
    Measures,
    acc=fraction, asr=fraction, asr_x4=fraction, asr_x9=fraction, asr_victim=fraction, asr_all=fraction,
    n=st.none() | st.integers(1, 10**9), signs=st.dictionaries(text, number, max_size=3),
)  # fmt: skip
batteries = st.builds(
    Battery,
    forms=st.lists(st.builds(FormRates, form=text, before=fraction, after=fraction), max_size=3),
    reactivation=st.none()
    | st.builds(
        Reactivation, epsilon=st.floats(0, 1), before=fraction, after=fraction, others_before=fraction, others_after=fraction
    ),
    relearning=st.lists(
        st.builds(Relearning, images=st.integers(1, 99), asr=fraction, others=fraction, acc=st.floats(0, 1)), max_size=3
    ),
    searched=st.integers(0, 99), n=st.integers(1, 99), forms_n=st.integers(1, 99),
)  # fmt: skip
changes = st.fixed_dictionaries(
    {},
    optional={
        "defense": st.builds(lambda settings: settings | {"name": "dhbe"}, st.dictionaries(text, plain, max_size=4)),
        "data": st.none() | text,
        "before": measures,
        "after": measures,
        "battery": st.none() | batteries,
        "seconds": st.floats(0, 1e9),
        "curve": st.lists(
            st.builds(lambda point, i: point | {"iteration": i}, st.dictionaries(text, number), st.integers(0, 10**6)),
            max_size=3,
        ),
        "warnings": st.lists(text, max_size=3),
    },
)


@given(changes)
def test_what_is_written_is_read(tmp_path_factory, changes):
    record = example(**changes)
    path = tmp_path_factory.mktemp("run") / "record.json"
    records.write(path, record)
    assert records.read(path) == record
    assert records.read(path).to_json() == record.to_json() == path.read_text()


def test_keys_come_in_the_order_of_the_fields():
    content = json.loads(example().to_json())
    assert list(content) == list(Record.model_fields)
    assert list(content["defense"]) == ["name", "alpha", "places", "dropout"]
    assert content["curve"][1] == {"iteration": 1, "distillation": 0.25}


def test_tuples_in_settings_equal_the_lists_that_come_back():
    assert example(attack={"name": "badnets", "place": (1, 2)}).attack == {"name": "badnets", "place": [1, 2]}


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["format"], 3, "its format is 3, this version reads formats 1 and 2"),
        (["kind"], "guess", "kind: Input should be 'erase'"),
        (["seed"], -1, "seed: "),
        (["seconds"], "12", "seconds: Input should be a valid number"),
        (["seconds"], math.nan, "finite"),
        (["extra"], 1, "extra: Extra inputs are not permitted"),
        (["before", "acc"], 1.01, "before.acc: .*less than or equal to 1"),
        (["after", "asr_x9"], -1e-9, "after.asr_x9: "),
        (["after"], None, "an erase needs defense, before and after"),
        (["defense"], None, "an erase needs defense, before and after"),
        (["defense"], {"alpha": 1}, 'defense: needs a "name"'),
        (["defense", "alpha"], math.inf, "defense: .*not JSON compliant"),
        (["before", "signs"], {"agreement": math.nan}, "before.signs.agreement: .*finite"),
        (["curve", 0, "bn_loss"], -math.inf, "curve.0.bn_loss: .*finite"),
        (["battery"], {"forms": [], "reactivation": None, "relearning": [], "searched": 1, "n": 0}, "battery.n: "),
        (["curve", 0], {"loss": 1.0}, 'curve.0: needs an "iteration"'),
        (["curve", 0, "iteration"], 0.5, 'curve.0: needs an "iteration"'),
        (["model", "sha256"], "../../etc", "model.sha256: "),
        (["model", "input"], [3, 32], "model.input"),
        (["finished"], "2025-01-31T12:00:00", "finished: not a time in UTC"),
        (["target"], 10, "there is no target 10 among 10 classes"),
        (["finished"], "yesterday\nevening", "finished: "),
    ],
)
def test_a_broken_record_is_one_line(tmp_path, path, value, says):
    file = tmp_path / "record.json"
    file.write_text(broken(json.loads(example().to_json()), *path, value=value))
    with pytest.raises(Refused, match=says) as caught:
        records.read(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 5000, b"PK\x03\x04", b"9" * 10_000],
)
def test_what_is_no_record_is_one_line(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(Refused, match="is not a record of dhbe") as caught:
        records.read(tmp_path / "record.json")
    assert "\n" not in str(caught.value)


def test_a_number_too_large_for_a_float_is_refused(tmp_path):
    (tmp_path / "record.json").write_text(example().to_json().replace("12.5", "1e999"))
    with pytest.raises(Refused, match="finite"):
        records.read(tmp_path / "record.json")


def test_a_record_must_state_its_format(tmp_path):
    (tmp_path / "record.json").write_text(example().to_json().replace('"format": 2,', ""))
    with pytest.raises(Refused, match="states no format"):
        records.read(tmp_path / "record.json")


def test_missing_folders_and_huge_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(Refused, match="is not a file"):
            records.read(path)
    with (tmp_path / "record.json").open("wb") as file:
        file.truncate(records.LARGEST + 1)  # sparse
    with pytest.raises(Refused, match="larger than 64 MiB"):
        records.read(tmp_path / "record.json")


def test_a_number_that_became_infinite_is_not_written(tmp_path):
    record = example()
    record.after.signs["agreement"] = math.nan
    with pytest.raises(Failed, match="not finite"):
        records.write(tmp_path / "record.json", record)
    assert not list(tmp_path.iterdir())


ROOT = Path(__file__).parents[1] / "results"


def first(folder: str, kind: str) -> Path:
    """A record of format 1 that is kept as it was written."""
    return next(
        path
        for path in sorted((ROOT / folder).glob("*.json"))
        if (told := json.loads(path.read_text()))["kind"] == kind and told["format"] == 1
    )


def test_a_scan_of_format_1_is_read_in_the_words_of_today():
    path = first("calibration", "scan")
    old, record = json.loads(path.read_text()), records.read(path)
    assert record.format == 2
    assert [found.margin for found in record.classes] == [found["lead"] for found in old["classes"]]
    assert [found.success_rate for found in record.classes] == [found["success"] for found in old["classes"]]
    assert record.defense is not None
    assert record.defense["anomaly_threshold"] == old["defense"]["suspicion"]
    assert record.defense["pool_size"] == old["defense"]["album"]
    assert set(record.families) == {"patches", "masked", "masked_half", "faint", "waves"}
    assert json.loads(record.to_json())["format"] == 2


def test_an_erase_of_format_1_is_read_in_the_words_of_today():
    path = first("erasures", "erase")
    old, record = json.loads(path.read_text()), records.read(path)
    assert record.before is not None
    assert record.before.signs["gain"] == old["before"]["signs"]["success"]
    assert {"suspicion", "calm", "light", "triggered", "shown", "change", "album"}.isdisjoint(record.defense or {})
    for point, then in zip(record.curve, old["curve"], strict=True):
        assert point.get("margin_patches") == then.get("lead_patches")
        assert point.get("bn_loss") == then.get("familiarity")
        assert point.get("gain") == then.get("success")


def test_a_record_of_a_peer_of_format_1_keeps_its_own_words():
    path = next(path for path in sorted((ROOT / "peers").glob("*.json")) if "neural" in path.name or "gdm" in path.name)
    old, record = json.loads(path.read_text()), records.read(path)
    assert record.curve == old["curve"]
    assert {**(record.defense or {})} == old["defense"]
    assert record.families == {}


@pytest.mark.parametrize("kind", ["attack", "score", "verify"])
def test_other_records_of_format_1_are_read_too(tmp_path, kind):
    told = json.loads(example(families={}).to_json())
    told |= {"format": 1, "kind": kind, "attack": {"name": "blend"}, "other": told["model"]}
    told |= {"verdict": "quiet" if kind == "verify" else None}
    told["before"]["signs"] = {"success": 0.5}
    del told["families"]
    (tmp_path / "record.json").write_text(json.dumps(told))
    record = records.read(tmp_path / "record.json")
    assert record.before is not None
    assert record.before.signs == {"success_rate": 0.5}
    assert (record.kind, record.format) == (kind, 2)
