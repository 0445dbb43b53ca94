"""What `dhbe.erase` promises to those who call it with a network of their own."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny

import dhbe
from dhbe.errors import Refused
from dhbe.networks import build

FAST = tiny(dhbe.FastDHBE())
SHAPE = (3, 8, 8)


def network(seed: int = 0, classes: int = 5) -> torch.nn.Module:
    """An untrained network in training mode, as most begin."""
    torch.manual_seed(seed)
    return build("resnet8", classes, SHAPE)


def test_the_callers_network_stays_as_it_is():
    given = network()
    given.requires_grad_(False)
    before = copy.deepcopy(given.state_dict())
    erasure = dhbe.erase(given, input_shape=SHAPE, defense=FAST)
    assert given.training
    assert not any(parameter.requires_grad for parameter in given.parameters())
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())
    assert not erasure.model.training
    assert any(not torch.equal(before[name], value) for name, value in erasure.model.state_dict().items())


def test_signs_are_the_same_whatever_mode_the_network_is_in():
    training, evaluating = (dhbe.erase(each, input_shape=SHAPE, defense=FAST) for each in (network(), network().eval()))
    assert training.record.before.signs == evaluating.record.before.signs
    assert training.record.after.signs == evaluating.record.after.signs


def test_a_network_that_is_frozen_in_part_is_cleaned_as_a_whole():
    given = network()
    first = next(iter(given.parameters())).requires_grad_(False)
    cleaned = next(iter(dhbe.erase(given, input_shape=SHAPE, defense=FAST).model.parameters()))
    assert not torch.equal(first, cleaned)


def test_a_folder_is_not_gone_on_with_for_other_weights(tmp_path: Path):
    given, options = network(), {"input_shape": SHAPE, "defense": FAST, "out": tmp_path}
    cleaned = dhbe.erase(given, **options).model
    again = dhbe.erase(copy.deepcopy(given), resume=True, **options).model
    assert all(torch.equal(cleaned.state_dict()[name], value) for name, value in again.state_dict().items())
    with pytest.raises(Refused, match="sha256"):
        dhbe.erase(network(1), resume=True, **options)


def test_a_method_of_another_form_does_not_pass_for_the_preset():
    assert dhbe.erase(network(), input_shape=SHAPE, defense=FAST).record.defense["preset"] == "fast"
    record = dhbe.erase(network(), input_shape=SHAPE, defense=tiny(dhbe.DHBE())).record
    assert (record.defense["preset"], record.precision) == ("none", "fp32")


def test_the_record_says_whether_a_class_stood_out():
    for anomaly_threshold in (1e9, 0.0):
        defense = tiny(dhbe.FastDHBE(), anomaly_threshold=anomaly_threshold)
        record = dhbe.erase(network(), input_shape=SHAPE, defense=defense).record
        said = any("no class stood out" in warning for warning in record.warnings)
        assert said == (record.before.signs["anomaly_index"] <= anomaly_threshold)
        assert said == (anomaly_threshold > 0)


@pytest.mark.parametrize(
    "wrong", [{"cycles": 0}, {"trigger_share": 1.0}, {"trigger_share_unsuspected": 0.0}, {"trigger_share": 1.5}]
)
def test_settings_that_leave_nothing_to_do_are_refused(wrong):
    with pytest.raises(Refused, match=f"`{next(iter(wrong))}` .*must be"):
        dhbe.erase(network(), input_shape=SHAPE, defense=replace(FAST, **wrong))
