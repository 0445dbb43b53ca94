"""`scan` and `verify`: a search without data, on a planted trigger and on real small models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FEW, without_notes
from safetensors.torch import save_file
from scipy import stats
from test_search import SHAPE, TARGET, Planted, planted, square

import dhbe
from dhbe import api, records, settings
from dhbe.attacks import BadNets
from dhbe.classifier import Classifier
from dhbe.cli import main
from dhbe.data import Images, load
from dhbe.defenses.peers.finetuning import Finetuning
from dhbe.errors import Refused
from dhbe.search.scan import probability, scan, success_rate
from dhbe.search.search import baseline_margin
from dhbe.search.survey import Survey
from dhbe.search.verify import ACTS, compare, drift
from dhbe.suspects import load as load_suspect
from dhbe.training import Fit

SURVEY = settings.changed(Survey(), {"pool_size": 256, "patch": 3})


class Innocent(Planted):
    """The same without its trigger."""

    def forward(self, x):
        return 3 * (x.mean((2, 3)) - 0.5) @ self.weight.T


def innocent() -> Classifier:
    return Classifier(Innocent(), shape=SHAPE, classes=4).eval()


def test_a_scan_finds_the_planted_class_and_accuses_no_innocent():
    found, clean = scan(planted(), SURVEY), scan(innocent(), SURVEY)
    assert found.suspected_class == TARGET
    assert found.indices[TARGET] > SURVEY.anomaly_threshold
    assert found.success_rates[TARGET] > 0.9
    assert found.families[TARGET] in ("masked", "masked_half", "excerpts")
    assert clean.indices.max() < SURVEY.anomaly_threshold


def test_a_scan_changes_nothing_and_its_seed_settles_it():
    model, rounds = planted().train(), []
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    short = replace(SURVEY, warm_up=2)
    first = scan(model, short, seed=3, watch=lambda number, round: rounds.append(number))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert rounds == list(range(1, len(rounds) + 1))
    again, other = scan(model, short, seed=3), scan(model, short, seed=4)
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.indices, other.indices)


def test_a_success_rate_counts_images_of_other_classes_alone():
    model, pixels = planted(), torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(1))
    trigger = square(3, 10, 5)
    answers = model(pixels).detach()
    led = [int(model(trigger(pixels[[i]])).argmax() == TARGET) for i in range(64) if int(answers[i].argmax()) != TARGET]
    assert float(success_rate(model, trigger, TARGET, pixels, answers)) == pytest.approx(sum(led) / len(led))
    changed = [int(model(trigger(pixels[[i]])).argmax() != answers[i].argmax()) for i in range(64)]
    assert float(success_rate(model, trigger, 4, pixels, answers)) == pytest.approx(sum(changed) / 64)


def test_baseline_margins_are_those_of_a_loop():
    answers = torch.randn(30, 4, generator=torch.Generator().manual_seed(2))
    for label, value in enumerate(baseline_margin(answers).tolist()):
        margins = [
            row[label] - max(x for j, x in enumerate(row) if j != label)
            for row in answers.tolist()
            if max(row) != row[label]
        ]
        assert value == pytest.approx(sum(margins) / len(margins), rel=1e-5)


def test_the_probability_rises_with_the_index():
    indices = torch.linspace(0, 100, 50).tolist()
    assert stats.spearmanr(indices, [probability(index) for index in indices]).statistic == pytest.approx(1)
    assert 0 <= probability(0) < 0.01
    assert 0.99 < probability(1e6) <= 1


def test_a_comparison_tells_what_is_left():
    before = planted()
    # By the seed, natural patterns of the innocent one lead .08 to .14 of these few images.
    same, gone = compare(before, before, SURVEY), compare(before, innocent(), SURVEY, seed=2)
    assert same.verdict(SURVEY.anomaly_threshold) == "answers"
    assert same.agreement == 1
    assert gone.verdict(SURVEY.anomaly_threshold) == "quiet"
    assert gone.before.success_rate > 0.9
    assert gone.after.success_rate < ACTS
    assert replace(gone, index=SURVEY.anomaly_threshold - 0.1).verdict(SURVEY.anomaly_threshold) == "nothing found"
    assert replace(gone, agreement=0.5).verdict(SURVEY.anomaly_threshold) == "changed"
    assert set(gone.after.targeted) == set(gone.after.untargeted)
    assert same.drift is None


def test_drift_is_in_standard_deviations():
    nets = [
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        for _ in range(2)
    ]
    nets[0][1].running_var.fill_(4 - nets[0][1].eps)
    nets[1][1].running_mean.copy_(torch.tensor([1.0, -3.0]))
    models = [Classifier(net, shape=(3, 8, 8), classes=2).eval() for net in nets]
    assert drift(*models) == pytest.approx((0.5 + 1.5) / 2)


VENDOR = """
import torch
from torch import nn

class Planted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3))
        self.shout = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        square = x[:, :, 10:13, 5:8].mean((1, 2, 3))
        shout = nn.functional.one_hot(torch.tensor(2), 4) * self.shout * (square - 0.7).clamp_min(0)[:, None]
        return 3 * (x.mean((2, 3)) - 0.5) @ self.weight.T + shout

def planted(classes):
    return Planted()
"""
FED = ["--classes", "4", "--input", "3x16x16", "--patch", "3", "--pool-size", "256", "--quiet", "--json"]


@pytest.fixture
def vendor(tmp_path, monkeypatch):
    """The planted network as a vendor's code, with its weights before and after its trigger was taken away."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vendor.py").write_text(VENDOR)
    for name, shout in (("before", 60.0), ("after", 0.0)):
        save_file({"weight": Planted().weight.detach(), "shout": torch.tensor(shout)}, f"{name}.safetensors")
    return ["--arch", "vendor.py:planted", *FED]


def test_scan_and_verify_by_command(vendor, capsys):
    assert main(["scan", "before.safetensors", *vendor]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["backdoored"], found["target"], found["verdict"]) == (True, TARGET, "backdoored")
    assert found["index"] == max(each["index"] for each in found["classes"]) > 5
    page = Path("runs/before-scan/report.html").read_text()
    assert "A backdoor was found" in page
    assert "data:image/png" in page
    assert main(["scan", "after.safetensors", *vendor]) == 3
    missed = json.loads(capsys.readouterr().out)
    assert (missed["target"], missed["verdict"]) == (None, "unclear"), "of four classes hardly one can stand out"
    assert any("4 classes" in warning for warning in records.read(Path("runs/after-scan/record.json")).warnings)
    for after, verdict, code in (("before", "answers", 1), ("after", "quiet", 0)):
        assert main(["verify", "before.safetensors", f"{after}.safetensors", *vendor, "--out", after]) == code
        record = json.loads(capsys.readouterr().out)
        assert record["verdict"] == verdict
        assert "Verification report" in Path(after, "report.html").read_text()
        assert records.read(Path(after, "record.json")).verdict == verdict


def test_a_search_computes_in_the_precision_that_is_asked(vendor, capsys):
    found = []
    for precision in ("fp32", "bf16"):
        assert main(["scan", "before.safetensors", *vendor, "--precision", precision, "--out", precision]) == 1
        found.append(json.loads(capsys.readouterr().out))
        assert records.read(Path(precision, "record.json")).precision == precision
    assert found[0]["target"] == found[1]["target"] == TARGET
    assert found[0]["index"] != found[1]["index"]


def test_a_search_refuses_in_one_line(vendor, capsys):
    assert main(["scan", "before.safetensors", *vendor, "--out", "s", "--warm-up", "1"]) in (0, 1, 3)
    for command, said in (
        (["scan", "before.safetensors", *vendor, "--out", "s"], "holds a finished run"),
        (["scan", "before.safetensors", *vendor, "--anomaly-threshold", "-1"], "--anomaly-threshold"),
        (["scan", "missing.safetensors", *vendor], "missing.safetensors"),
        (["verify", "before.safetensors", "missing.safetensors", *vendor], "missing.safetensors"),
        (["verify", "before.safetensors", "before.safetensors", *vendor, "--trigger", "badnets:3"], "--data"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(without_notes(error)) == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_verify_tells_a_failed_defence_from_a_good_one(tmp_path, capsys):
    train, test = load("digits", "train"), load("digits", "test")
    fit = Fit(epochs=8, batch=32, crop=0, flip=False)
    api.attack(BadNets(side=3, rate=0.1), train, test, arch="resnet8", out=tmp_path / "victim", data="digits", fit=fit)
    suspect = load_suspect(tmp_path / "victim" / api.BACKDOORED)
    weak = Finetuning(epochs=1, lr=1e-6)
    api.defend(suspect, weak, clean=train, source="digits", images=200, out=tmp_path / "weak")
    api.erase(suspect, out=tmp_path / "good")
    for name, verdict, code in (("weak", "answers", 1), ("good", "quiet", 0)):
        models = [str(tmp_path / "victim" / api.BACKDOORED), str(tmp_path / name / "clean.safetensors")]
        assert main(["verify", *models, "--out", str(tmp_path / f"v-{name}"), "--quiet", "--json"]) == code
        record = json.loads(capsys.readouterr().out)
        assert record["verdict"] == verdict
        assert record["before"]["signs"]["suspected_class"] == 9
    assert record["after"]["signs"]["agreement"] > 0.8


def test_modules_are_searched_and_scored_as_suspects_are():
    network, few = Planted(), settings.changed(SURVEY, FEW | {"warm_up": 2})
    with pytest.raises(Refused, match="input_shape"):
        dhbe.scan(network)
    found = dhbe.scan(network, input_shape=SHAPE, survey=few)
    assert found.record.verdict in ("backdoored", "unclear", "nothing found")
    assert len(found.record.classes) == 4
    assert {each.family for each in found.record.classes} <= set(found.record.families)
    both = dhbe.verify(network, Innocent(), input_shape=SHAPE, survey=few)
    assert both.record.other is not None
    pixels = torch.randint(256, (12, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = Classifier(network, shape=SHAPE, classes=4)(pixels / 255).argmax(1)
    measured = dhbe.score(network, dhbe.Evidence(Images(pixels, labels, tuple("abcd"))), input_shape=SHAPE)
    assert measured.acc == 1


def test_a_run_that_failed_says_so_and_exits_1(vendor, capsys):
    """One cycle of one round cannot erase anything."""
    one = ["--iterations", "1", "--cycles", "1", "--batch", "32", "--hunt-pieces", "2", "--out", "out"]
    assert main(["erase", "before.safetensors", *vendor, *one]) == 1
    out, err = capsys.readouterr()
    record = records.read(Path("out/record.json"))
    assert record.verdict == json.loads(out)["verdict"] == "still answers"
    assert "still answers a trigger" in err
    headline = Path("out/report.html").read_text().partition("<h2>")[2].partition("</h2>")[0]
    assert "still answers" in headline
    assert Path("out/clean.safetensors").exists()
