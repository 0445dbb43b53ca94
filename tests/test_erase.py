"""What `dhbe.erase` promises to those who call it with a network of their own."""

import copy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image

import dhbe
from dhbe.data import pictures
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


def test_a_users_pictures_take_the_place_of_the_photographs(tmp_path: Path):
    """Of any size and depth; nothing is asked of their names, and a run is not resumed with others."""
    drawn = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3), np.uint8)
    for place, pixels in (
        ("a.png", drawn[0]),
        ("b/c.png", drawn[1, :5, :6]),
        ("b/long.png", drawn[1, :4].repeat(200, 1)),
    ):
        (tmp_path / "pictures" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "pictures" / place)
    (tmp_path / "pictures/notes.txt").write_text("no picture")
    options = {"input_shape": SHAPE, "defense": FAST, "out": tmp_path / "out", "images": tmp_path / "pictures"}
    erasure, photographed = dhbe.erase(network(), **options), dhbe.erase(network(), input_shape=SHAPE, defense=FAST)
    assert erasure.record.defense["pictures"] == 3
    assert any(
        not torch.equal(value, photographed.model.state_dict()[name])
        for name, value in erasure.model.state_dict().items()
    )
    (tmp_path / "pictures/a.png").unlink()
    with pytest.raises(Refused, match="pictures"):
        dhbe.erase(network(), resume=True, **options)


@pytest.mark.parametrize(
    ("content", "preset", "said"),
    [
        ([], "fast", "the folder holds no pictures"),
        (["x.png"], "fast", "is not a readable image"),
        ([], "paper", "the preset paper generates all its images"),
        (None, "fast", "no such folder"),
    ],
)
def test_pictures_that_cannot_be_used_are_refused(tmp_path: Path, content: list[str] | None, preset: str, said: str):
    folder = tmp_path / "pictures"
    if content is not None:
        folder.mkdir()
        for name in content:
            (folder / name).write_bytes(b"no picture")
    with pytest.raises(Refused, match=said):
        dhbe.erase(network(), input_shape=SHAPE, preset=preset, images=folder)


def test_of_many_pictures_evenly_spaced_ones_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "MOST", 3)
    for number in range(7):
        Image.new("RGB", (600, 300), (number, 0, 0)).save(tmp_path / f"{number}.png")
    found, notes = pictures.load_pictures(tmp_path)
    assert [int(each[0].amax()) for each in found] == [0, 3, 6]
    assert {tuple(each.shape) for each in found} == {(3, 256, 512)}
    assert len(notes) == 1


def test_a_budget_ends_a_run_between_two_cycles_and_the_record_says_so(monkeypatch: pytest.MonkeyPatch):
    hours = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: 3600.0 * next(hours))  # each look at the clock costs an hour
    defense = tiny(dhbe.FastDHBE(), anomaly_threshold=0.0, cycles=2)
    for budget, cycles in ((None, defense.cycles), (1e9, defense.cycles), (1.0, 1)):
        record = dhbe.erase(network(), input_shape=SHAPE, defense=defense, budget=budget).record
        assert record.iterations == defense.survey.warm_up + cycles * defense.iterations
        assert any("budget" in warning for warning in record.warnings) == (cycles == 1)


@pytest.mark.parametrize(
    ("budget", "preset", "said"), [(0.0, "fast", "above 0"), (5.0, "paper", "only the preset fast")]
)
def test_a_budget_that_means_nothing_is_refused(budget: float, preset: str, said: str):
    with pytest.raises(Refused, match=said):
        dhbe.erase(network(), input_shape=SHAPE, preset=preset, budget=budget)
