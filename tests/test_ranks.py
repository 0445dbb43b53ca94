import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dhbe import checkpoint, networks, ranks, records
from dhbe.cli import main

ROOT = Path(__file__).parents[1]
EXACT = "--preset official --iterations 1 --student-steps 2 --batch 16 --places sample --patch 3 --smooth .01"


def erase(settings, out):
    return f"erase model.pt --input 3x16x16 --device cpu --precision fp32 --quiet {settings} --out {out}".split()


def torchrun(folder, *words, processes=2):
    """Starts a command as often as that, and waits; each process writes its final weights' sum into `sums`."""
    here = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *words,
    ]
    return subprocess.run(command, cwd=folder, env=here, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_two_processes_write_one_result_with_the_record_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(networks.build("resnet8", 3, (3, 16, 16)).state_dict(), "model.pt")
    assert main(erase(EXACT, "one")) == 0
    ran = torchrun(tmp_path, "-m", "dhbe", *erase(EXACT, "two"))
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("see two/report.html") == 1, "one process tells"
    told = [records.read(Path(name) / "record.json") for name in ("one", "two")]
    assert told[0].iterations == told[1].iterations
    assert told[0].defense == told[1].defense
    weights = checkpoint.read(Path("two") / "clean.safetensors").tensors
    assert any(not torch.equal(value, weights[name]) for name, value in torch.load("model.pt").items())


PROGRAM = """
import torch
from torch import nn
from types import SimpleNamespace
from dhbe import ranks
from dhbe.classifier import Classifier
from dhbe import networks
from dhbe.defenses import DHBE, FastDHBE
from dhbe.steps import descend, lay, variation

with ranks.joined() as first:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).double().float()
    learn = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    with ranks.whole_batches(network):
        for _ in range(3):
            pixels = ranks.part(3 * torch.randn(8, 3, 8, 8) + 1) + lay(ranks.part(torch.randn(8, 3, 2, 2)), 8, 8, each=True)
            pixels = pixels.requires_grad_()
            descend(learn, network(pixels).square().mean() + 0.01 * variation(network[:3](pixels)))
    assert not any("forward" in vars(layer) for layer in network)
    student = Classifier(network.eval(), shape=(3, 8, 8), classes=2)
    pool = SimpleNamespace(sample=lambda count, evenly: (torch.rand(count, 3, 8, 8), torch.randn(count, 2)))
    stamp = lambda pixels: (pixels + 0.1).clamp(0, 1)
    stamps = type("Stamps", (), {"__getitem__": lambda self, index: stamp})()
    bank = SimpleNamespace(draw=lambda groups: stamps)
    state = SimpleNamespace(pool=pool, bank=bank, findings=SimpleNamespace(backdoored=True))
    FastDHBE(batch=12).step_student(student, torch.optim.SGD(student.parameters(), 0.1), state)
    torch.set_default_dtype(torch.float64)  # at fp32 an untrained network enlarges rounding tenfold a step
    victim = Classifier(networks.build("resnet8", 3, (3, 16, 16)), shape=(3, 16, 16), classes=3)
    exact = DHBE(iterations=2, student_steps=2, batch=16, places="sample", patch=3, smooth=0.01, detach_clean=True)
    whole = {f"exact.{name}": value for name, value in exact(victim).state_dict().items()}
    torch.save(network.state_dict() | whole, f"{ranks.rank()}-of-{ranks.size()}.pt")
"""


@pytest.mark.slow
def test_gradients_statistics_places_and_students_steps_are_those_of_the_whole_batch(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    for processes in (1, 2):
        ran = torchrun(tmp_path, "program.py", processes=processes)
        assert ran.returncode == 0, ran.stderr[-2000:]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2"))
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), f"the processes differ in {name}"
        exact = {"rtol": 1e-9, "atol": 1e-9} if name.startswith("exact.") else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(first[name], value, **exact)


def test_alone_nothing_is_done():
    layer, batch = nn.BatchNorm2d(2), torch.randn(4, 2, 3, 3)
    with ranks.joined() as first, ranks.whole_batches(layer):
        assert first
        assert "forward" not in vars(layer)
    assert ranks.part(batch) is batch
    assert ranks.total(batch) is batch
    assert ranks.agreed(batch) is batch
    ranks.check(7)


def test_a_layer_normalises_as_torchs_own(monkeypatch):
    ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    for _ in range(2):
        pixels = 5 * torch.randn(4, 3, 6, 6) + 2
        mine, its = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
        made, expected = ranks._normalised(ours, mine), theirs(its)
        made.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(made, expected)
        torch.testing.assert_close(mine.grad, its.grad, atol=1e-4, rtol=1e-4)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    ours.eval()
    torch.testing.assert_close(ranks._normalised(ours, pixels), theirs.eval()(pixels))


def test_what_processes_cannot_share_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ranks, "size", lambda: 3)
    monkeypatch.chdir(tmp_path)
    torch.save(networks.build("resnet8", 3, (3, 16, 16)).state_dict(), "model.pt")
    for settings, said in ((f"{EXACT} --resume", "without torchrun"), (EXACT, "multiple of 3")):
        assert main(erase(settings, "out")) == 2
        assert said in capsys.readouterr().err
