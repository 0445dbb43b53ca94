"""What a file says of itself is a claim."""

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from dhbe import networks, suspects
from dhbe.api import judging
from dhbe.data import NORMALISATION
from dhbe.errors import Refused
from dhbe.records import Measures
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
    assert lying.unsure
    assert "--mean=cifar10" in lying.unsure


def test_a_wrong_label_is_told_from_a_wrong_guess_and_a_finding_comes_before_both(tmp_path):
    bare = tmp_path / "bare.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(VICTIM), bare)
    guessed, lying = suspects.load(bare), suspects.load(labelled(tmp_path / "m.safetensors", mean=[0.0], std=[1.0]))
    assert judging.judged("nothing found", guessed) == ("unclear", guessed.unsure)
    assert judging.judged("erased", lying) == ("label contradicted", lying.unsure)
    assert judging.judged("backdoored", lying) == ("backdoored", None)
    assert judging.judged("nothing found", suspects.load(VICTIM)) == ("nothing found", None)


def test_a_network_fed_with_0_to_255_is_told_so(tmp_path):
    """Its first kernel undoes the division, as that of a network trained without `ToTensor` would."""
    tensors = safetensors.torch.load_file(VICTIM)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in NORMALISATION["cifar10"])
    first = next(key for key, value in tensors.items() if value.ndim == 4)
    tensors[first] = tensors[first] / (255 * std.mean())
    statistics = next(key for key in tensors if key.endswith("running_mean"))
    tensors[statistics] = tensors[statistics] + (tensors[first] * 255 * mean).sum((1, 2, 3))
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    found = suspects.load(tmp_path / "m.safetensors", mean="auto")
    assert found.info.std == pytest.approx((1 / 255,) * len(found.info.std))
    assert any("--mean=0 --std=.0039216" in note for note in found.flagged)


def test_the_right_constants_are_not(tmp_path):
    assert suspects.load(VICTIM).contradiction is None
    imagenet = suspects.load(VICTIM, mean="imagenet")
    assert imagenet.info.std == (0.229, 0.224, 0.225)
    assert imagenet.contradiction is None


def test_what_the_user_gives_holds_and_a_note_says_what_fits_better():
    wrong = suspects.load(VICTIM, mean=(0.0,), std=(1.0,))
    assert wrong.unsure is None
    assert "--mean=cifar10" in wrong.flagged[-1]
    assert "`mean='cifar10'`" in wrong.notes[-1]
    assert "were given and are used" in wrong.flagged[-1]


def test_auto_takes_what_fits_best_and_says_so():
    found = suspects.load(VICTIM, mean="auto")
    assert found.info.mean == pytest.approx((0.4914, 0.4822, 0.4465))
    assert found.info.std == pytest.approx((0.247, 0.2435, 0.2616))
    assert "--mean=auto: --mean=cifar10" in found.flagged[0]
    assert found.contradiction is None


def test_a_network_without_batchnorm_contradicts_nothing():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    assert suspects.of(network, (3, 8, 8)).contradiction is None
    with pytest.raises(Refused, match="with BatchNorm layers"):
        suspects.of(network, (3, 8, 8), mean="auto")


def test_a_network_that_was_never_trained_is_no_usable_input():
    torch.manual_seed(0)
    assert suspects.load(VICTIM).unusable is None
    raw = suspects.of(networks.build("resnet8", 10, (3, 16, 16)).eval(), (3, 16, 16))
    assert judging.judged("nothing found", raw)[0] == judging.judged("backdoored", raw)[0] == "input not usable"


@pytest.mark.parametrize(
    ("options", "said"),
    [("--mean imagine", "give numbers, or one of"), ("--std auto", "give numbers, or one of"),
     ("--mean auto --std .5", "omit --std"), ("--mean cifar10 .5", "give either one name or numbers")],
)  # fmt: skip
def test_constants_that_make_no_sense_are_refused_in_one_line(options, said, here, dhbe):
    code, _, err = dhbe(f"score model.pt --input 3x16x16 --data data.npz {options}")
    assert code == 2
    assert said in err


def nothing(model, survey, **options):
    """A search that found nothing."""
    classes, grey = model.classes, torch.full((16, *model.shape), 0.5)
    triggers = Overlay(torch.ones(classes, 1, *model.shape[1:]), torch.zeros(classes, *model.shape))
    low = torch.full((classes,), 0.1)
    return scan.Found(
        low,
        ["patches"] * classes,
        low,
        low,
        triggers,
        low.expand(len(STATISTICS), -1),
        low,
        grey,
        torch.arange(classes),
    )


def test_a_scan_of_a_model_whose_label_lies_gives_no_all_clear(tmp_path, dhbe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scan, "scan", nothing)
    labelled(tmp_path / "m.safetensors", mean=[0.0], std=[1.0])
    for options, verdict in (("", "label contradicted"), ("--mean cifar10", "nothing found")):
        code, out, err = dhbe(f"scan m.safetensors --device cpu --precision fp32 --json --overwrite {options}")
        assert json.loads(out)["verdict"] == verdict
        assert code == (0 if options else 3)
        assert ("taken from the file's own label" in err) == (not options)
        assert ("give --mean=cifar10, or --mean=auto" in err) == (not options)
        assert ("better than the mean and standard deviation in its own label" in err) == (not options)
    code, out, _ = dhbe("scan m.safetensors --device cpu --precision fp32 --json --overwrite --fail-on found")
    assert (code, json.loads(out)["verdict"]) == (0, "label contradicted")


def test_what_the_user_says_wins(tmp_path):
    lying = labelled(tmp_path / "m.safetensors", std=[5.0], input=[3, 16, 16])
    suspect = suspects.load(lying, mean=(0.5,), std=(0.25,), input_shape=(3, 32, 32))
    assert (suspect.info.mean, suspect.info.std, suspect.info.input) == ((0.5,), (0.25,), (3, 32, 32))
    assert suspect.given


def test_large_images_are_not_tried_because_a_file_says_so(tmp_path):
    with pytest.raises(
        Refused, match=r"claims an image shape of 3x1024x1024: add `input_shape=\(3, 1024, 1024\)` to confirm it"
    ):
        suspects.load(labelled(tmp_path / "m.safetensors", input=[3, 1024, 1024]))


def test_a_defence_without_effect_is_told_by_the_asr_or_by_its_weights():
    torch.manual_seed(0)
    model, other = (suspects.of(networks.build("resnet8", 4, (3, 8, 8)), (3, 8, 8)).classifier for _ in range(2))
    measured = [Measures(asr=rate, asr_x9=1.0, n=9, asr_n=9) for rate in (0.99, 0.95, 0.3, 0.15, 0.06)]
    assert judging.ineffective(measured[0], measured[1], model, other)
    assert not judging.ineffective(measured[0], measured[2], model, model)
    assert not judging.ineffective(measured[3], measured[4], model, model)  # what a report calls suppressed
    assert judging.ineffective(Measures(), Measures(), model, model)
    assert not judging.ineffective(Measures(), Measures(), model, other)
