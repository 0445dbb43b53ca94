"""Hyperparameters: said, bounded and recorded in one way, for every method there is."""

import argparse
import json
import math
from dataclasses import fields, is_dataclass

import pytest
from conftest import TINY, fast
from hypothesis import given
from hypothesis import strategies as some

import dhbe
from dhbe import settings
from dhbe.attacks import ALL as ATTACKS
from dhbe.attacks import BadNets
from dhbe.cli.attack import _suited
from dhbe.cli.parser import configured
from dhbe.defenses import PEERS, PRESETS
from dhbe.errors import Refused
from dhbe.search.families import FAMILIES, SENTENCES
from dhbe.training import RECIPES, Fit

METHODS = [
    *PRESETS.values(),
    *(kind() for kind in PEERS.values()),
    *(kind() for kind in ATTACKS.values()),
    Fit(epochs=1),
]
every = pytest.mark.parametrize("method", METHODS, ids=lambda method: getattr(method, "name", type(method).__name__))


@every
def test_every_field_says_what_it_is_and_its_default_lies_within_its_bounds(method):
    described = list(settings.described(type(method)))
    names = [field.name for field in described]
    assert len(set(names)) == len(names), "groups are laid flat"
    assert list(settings.flat(method)) == names
    for field in described:
        assert len(field.setting.text) > 5
        assert not field.setting.text.endswith(" ")
    settings.check(method)


@every
def test_what_a_record_holds_gives_the_method_back(method):
    recorded = json.loads(json.dumps(settings.flat(method)))
    assert settings.changed(method, recorded) == method


@given(share=some.floats(allow_nan=True, allow_infinity=True))
def test_a_share_is_refused_exactly_where_its_bounds_say(share):
    defense = settings.changed(PRESETS["fast"], {"trigger_share": share})
    if 0 < share < 1:
        settings.check(defense)
    else:
        with pytest.raises(Refused, match=r"`trigger_share` .*: it must be above 0 and below 1"):
            settings.check(defense)


@pytest.mark.parametrize("value", [(0,), (1, 0), (math.nan,)])
def test_each_value_of_a_list_is_held_to_the_bounds(value):
    with pytest.raises(Refused, match="`square_sides`"):
        settings.check(fast(square_sides=value))


def test_groups_are_changed_by_the_names_of_their_fields():
    changed = fast(patch=3, room=0.5, warm_up=7)
    assert (changed.survey.bounds.patch, changed.survey.bank.room, changed.survey.warm_up) == (3, 0.5, 7)
    assert changed.batch == dhbe.FastDHBE().batch
    groups = [each.name for each in fields(changed.survey) if is_dataclass(getattr(changed.survey, each.name))]
    assert groups == ["bounds", "squares", "excerpting", "bank"]


def test_an_option_by_its_old_name_still_works_for_one_version_and_says_so(here, dhbe):
    old = TINY.replace("--pool-size 16", "--album 16").replace("--anomaly-threshold 1e9", "--suspicion 99")
    code, out, err = dhbe(f"erase model.pt --input 3x16x16 {old} --out out --json --quiet")
    assert code == 0
    assert "note: --album is now called --pool-size" in err
    recorded = json.loads(out)["defense"]
    assert (recorded["pool_size"], recorded["anomaly_threshold"]) == (16, 99)
    code, out, _ = dhbe("erase --help")
    assert "--album" not in out


def test_each_family_of_triggers_says_what_it_is():
    assert [family.name for family in FAMILIES] == list(SENTENCES)
    assert len(set(SENTENCES.values())) == len(FAMILIES)
    assert all(isinstance(family.local, bool) and isinstance(family.accuses, bool) for family in FAMILIES)
    assert any(family.accuses for family in FAMILIES)


def test_options_come_from_a_file_and_those_given_win(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('model = "a.pt"\niterations = 4\nmean = [0.1, 0.2, 0.3]\nquiet = true\nlr = 1.0\n')
    words = configured(["--config", str(file), "--lr", "2"])
    assert words == ["a.pt", "--lr", "2", "--iterations", "4", "--mean", "0.1", "0.2", "0.3", "--quiet"]
    with pytest.raises(Refused, match="must be TOML"):
        configured(["--config", str(tmp_path)])


@pytest.mark.parametrize(
    ("command", "said"),
    [("scam", "did you mean scan?"), ("attack badnet", "did you mean badnets?"), ("defend nadd x", "did you mean nad?"),
     ("scan model.pt --sead 1", "did you mean --seed?"), ("scan model.pt --arch resnet81", "did you mean resnet8?")],
)  # fmt: skip
def test_a_slip_is_answered_with_what_was_meant(command, said, here, dhbe):
    code, _, err = dhbe(command)
    assert (code, said in err) == (2, True)


def test_few_digits_are_poisoned_more_and_not_mirrored():
    args = argparse.Namespace(data="digits", lr=None, batch=16)
    assert _suited(args, BadNets(), RECIPES["usual"], 1440) == {"rate": 0.1, "epochs": 10, "crop": 0, "flip": False}
    args.data = "cifar10"
    assert _suited(args, BadNets(), RECIPES["usual"], 50_000) == {}
