"""Misbehaving networks and a clock that goes backwards: used with a note, or refused in one line."""

import datetime
import itertools
import re
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY, without_notes

from dhbe import networks, records, suspects
from dhbe.api import machine
from dhbe.errors import Refused

CODE = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)
    def features(self, x):
        return F.relu(self.norm(self.conv(x))).mean((2, 3))
    def forward(self, x):
        return self.fc(self.features(x))

class Dropout(Net):
    def forward(self, x):
        return self.fc(F.dropout(self.features(x), 0.5, training=True))

class Counts(Net):
    calls = 0
    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls % 5)

class InPlace(Net):
    def forward(self, x):
        return super().forward(x.mul_(0.5).add_(1))

class NoOne(Net):
    def forward(self, x):
        if len(x) == 1:
            raise ValueError("one image is no batch")
        return super().forward(x)

class Squeezes(Net):
    def forward(self, x):
        return super().forward(x).squeeze()

class NotANumber(Net):
    def forward(self, x):
        return super().forward(x) * (0.5 - x.mean((1, 2, 3))).sqrt()[:, None]

class Huge(Net):
    def forward(self, x):
        return super().forward(x) * 1e30

class Odd(Net):  # hooks, parametrisations old and new, tied, frozen and integer weights, in-place operations, squeezed output
    def __init__(self, classes):
        super().__init__(classes)
        nn.utils.spectral_norm(self.conv)
        self.mix = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
        self.again = nn.Linear(8, classes)
        self.again.weight = self.fc.weight
        self.whole = nn.Parameter(torch.arange(8 * classes, dtype=torch.int8).view(classes, 8), requires_grad=False)
        self.fc.register_forward_hook(lambda module, given, answer: 2 * answer)
        self.requires_grad_(False)
    def forward(self, x):
        f = self.mix(self.features(x.mul_(0.5).add_(1)))
        return (self.fc(f) + self.again(f) + 0.01 * F.linear(f, self.whole.float())).squeeze()
"""
ERASE = (
    f"erase model.pt --arch v.py:{{}} --classes 3 --input 3x8x8 --mean .5 --std .25 {TINY} --lr .1 --out out --quiet"
)
VARIES = "note: the network's output differs each time for the same images .*switch that off if it is not intended"
CONTIGUOUS = "note: the network's code requires contiguous tensors"


@pytest.fixture
def brought(tmp_path, monkeypatch):
    """Writes the vendor's code and the weights of one of its networks; returns the network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.py").write_text(CODE)

    def bring(name):
        torch.manual_seed(0)
        network = networks.build("v.py:" + name, 3, (3, 8, 8))
        network.train()
        for _ in range(20):
            network(torch.rand(16, 3, 8, 8) - 0.7)
        torch.save(network.state_dict(), "model.pt")
        return network.eval()

    return bring


def loaded(name, file="model.pt"):
    return suspects.load(file, arch=f"v.py:{name}", classes=3, input_shape=(3, 8, 8), mean=(0.5,), std=(0.25,))


def test_a_network_that_answers_otherwise_each_time_is_used_and_a_note_says_so(brought, dhbe):
    brought("Dropout")
    code, _, err = dhbe(ERASE.format("Dropout"))
    assert (code, without_notes(err)) == (0, []), err
    assert any(re.fullmatch(VARIES, line) for line in err.splitlines())
    assert CONTIGUOUS not in err
    assert any("output differs" in warning for warning in records.read(Path("out/record.json")).warnings)


def test_a_counter_in_the_code_is_noted_too_and_an_ordinary_network_is_not(brought):
    network = brought("Counts")
    assert any("output differs" in note for note in loaded("Counts").warnings)
    assert any("output differs" in note for note in suspects.of(network, (3, 8, 8)).warnings)
    assert not suspects.of(brought("Net"), (3, 8, 8)).warnings


def test_a_network_that_works_in_place_changes_no_image_of_ours(brought):
    network = brought("InPlace")
    suspect = loaded("InPlace")
    assert not any("contiguous" in note or "output differs" in note for note in suspect.warnings)
    images = torch.rand(4, 3, 8, 8)
    kept = images.clone()
    with torch.no_grad():
        first, second = suspect.classifier.logits(images), suspect.classifier.logits(images)
        assert torch.equal(images, kept)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, network(kept))


def test_an_answer_to_one_image_may_lack_its_batch(brought):
    brought("Odd")
    classifier, images = loaded("Odd").classifier, torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images)[:1], classifier(images[:1]))


@pytest.mark.parametrize("name", ["Odd", "Huge"])
def test_unusual_networks_are_cleaned_in_their_own_form(name, brought, dhbe):
    given = brought(name).state_dict()
    code, _, err = dhbe(ERASE.format(name))
    assert (code, without_notes(err)) == (0, []), err
    cleaned = safetensors.torch.load_file("out/clean.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in cleaned.items()} == {k: (v.shape, v.dtype) for k, v in given.items()}
    assert all(value.isfinite().all() for value in cleaned.values())
    if name == "Odd":
        assert not torch.equal(cleaned["fc.weight"], given["fc.weight"])
        assert torch.equal(cleaned["again.weight"], cleaned["fc.weight"])
        assert torch.equal(cleaned["whole"], given["whole"])
        assert not torch.equal(cleaned["conv.weight_orig"], given["conv.weight_orig"])
        mix = loaded(name, "out/clean.safetensors").classifier.network.mix.weight
        torch.testing.assert_close(mix @ mix.T, torch.eye(8), rtol=1e-4, atol=1e-4)


def test_a_network_that_raises_on_one_image_fails_in_one_line_that_names_its_code(brought, dhbe):
    brought("NoOne")
    code, out, err = dhbe(ERASE.format("NoOne"))
    assert (code, out) == (4, "")
    assert without_notes(err) == ["dhbe: the vendor's code v.py:NoOne raised ValueError: one image is no batch"]


@pytest.mark.parametrize("verb", ["erase", "scan"])
def test_a_network_without_an_answer_to_ordinary_images_is_refused(verb, brought, dhbe):
    brought("NotANumber")
    command = (
        ERASE.format("NotANumber")
        if verb == "erase"
        else "scan model.pt --arch v.py:NotANumber --classes 3 --input 3x8x8"
    )
    code, out, err = dhbe(command)
    assert (code, out) == (2, "")
    (line,) = without_notes(err)
    assert re.fullmatch(
        r"dhbe: the network returns NaN or infinite logits for (noise of --input 3x8x8|\d+ of 8 pieces of photographs: "
        "check --mean and --std, and the divisions and roots in its code)",
        line,
    )


def test_a_module_in_memory_is_held_to_the_same(brought):
    with pytest.raises(Refused, match="NaN or infinite logits"):
        suspects.of(brought("NotANumber"), (3, 8, 8))


def test_a_clock_that_jumps_backwards_changes_no_duration(brought, dhbe, monkeypatch):
    brought("Net")
    hours, now = itertools.count(), time.time()

    class Backwards(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(time.time(), tz)

    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(hours))
    monkeypatch.setattr(machine, "datetime", Backwards)
    code, _, err = dhbe(f"{ERASE.format('Net')} --checkpoint-every 0")
    assert (code, without_notes(err)) == (0, []), err
    record = records.read(Path("out/record.json"))
    assert 0 < record.seconds < 3600
    assert datetime.datetime.fromisoformat(record.finished).timestamp() <= now
