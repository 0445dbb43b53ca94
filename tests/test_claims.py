"""What a file says of itself is a claim."""

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from dhbe import claims, suspects
from dhbe.errors import Refused
from dhbe.search import scan
from dhbe.search.families import Overlay
from dhbe.search.statistics import STATISTICS

VICTIM = Path(__file__).parents[1] / "zoo" / "badnets-3.safetensors"


def labelled(path, source=VICTIM, **changed):
    """The same weights, with another label."""
    with safetensors.safe_open(source, "pt") as file:
        label = json.loads(file.metadata()["dhbe"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    safetensors.torch.save_file(tensors, path, {"dhbe": json.dumps(label | changed)})
    return path


@pytest.mark.parametrize("std", [[1.0], [0.02]])
def test_a_label_that_lies_is_contradicted_by_batchnorm(std, tmp_path):
    lying = suspects.load(labelled(tmp_path / "m.safetensors", std=std))
    assert lying.claimed
    assert claims.contradicted(lying.classifier)


def test_the_right_constants_are_not(tmp_path):
    honest = suspects.load(VICTIM)
    assert honest.claimed
    assert not claims.contradicted(honest.classifier)
    imagenet = suspects.load(VICTIM, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert not imagenet.claimed
    assert not claims.contradicted(imagenet.classifier)


def test_a_network_without_batchnorm_contradicts_nothing():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    assert not claims.contradicted(suspects.Classifier(network, shape=(3, 8, 8), classes=4))


def nothing(model, survey, **options):
    """A search that found nothing."""
    classes, grey = model.classes, torch.full((16, *model.shape), 0.5)
    triggers = Overlay(torch.ones(classes, 1, *model.shape[1:]), torch.zeros(classes, *model.shape))
    low = torch.full((classes,), 0.1)
    return scan.Found(low, ["patches"] * classes, low, low, triggers, low.expand(len(STATISTICS), -1), low, grey)


def test_a_scan_of_a_model_whose_label_lies_gives_no_all_clear(tmp_path, dhbe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scan, "scan", nothing)
    labelled(tmp_path / "m.safetensors", mean=[0.0], std=[1.0])
    for options, verdict in (("", "unclear"), ("--mean cifar10 --std cifar10", "nothing found")):
        _, out, err = dhbe(f"scan m.safetensors --device cpu --precision fp32 --json --overwrite {options}")
        assert json.loads(out)["verdict"] == verdict
        assert ("taken from what the file says of itself" in err) == (not options)
        assert ("contradict its BatchNorm statistics" in err) == (not options)


def test_what_the_user_says_wins(tmp_path):
    lying = labelled(tmp_path / "m.safetensors", std=[5.0], input=[3, 16, 16])
    suspect = suspects.load(lying, mean=(0.5,), std=(0.25,), shape=(3, 32, 32))
    assert (suspect.info.mean, suspect.info.std, suspect.info.input) == ((0.5,), (0.25,), (3, 32, 32))
    assert not suspect.claimed


def test_large_images_are_not_tried_because_a_file_says_so(tmp_path):
    with pytest.raises(Refused, match="says that its images are 3x1024x1024: add --input 3x1024x1024 if they are"):
        suspects.load(labelled(tmp_path / "m.safetensors", input=[3, 1024, 1024]))
