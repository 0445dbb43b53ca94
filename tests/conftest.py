"""What tests share: small victims, small data, settings that take no time, and a place of their own."""

import io
import shlex
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings as hypothesis
from PIL import Image
from torch import nn

from dhbe import networks, settings
from dhbe.classifier import Classifier
from dhbe.cli import main
from dhbe.defenses import FastDHBE

hypothesis.register_profile("untimed", deadline=None)  # no test is timed
hypothesis.load_profile("untimed")

FEW = {
    "images_per_class": 2, "least_images": 8, "generator_batch": 8, "judged_images": 16, "agreement_images": 16,
    "gain_images": 4, "bank_images": 4, "probe_images": 16, "square_images": 1, "square_sides": (1, 2), "seek_images": 8,
    "second_rounds": 2, "deep_images": 2, "deep_steps": 2, "swept_images": 1, "tried_images": 2, "tried_pieces": 1,
    "hunt_sides": (3,), "hunt_pieces": 1, "scattered_steps": 1, "scattered_images": 4,
}  # fmt: skip
"""Sample sizes that take no time."""

# So few rounds may end anywhere, and so do the verdict and the exit code: nothing stands out, and nothing is damaged.
# That a network of noise is no usable input is not their business either.
TINY = (
    "--iterations 2 --warm-up 1 --batch 8 --pool-size 16 --anomaly-threshold 1e9 --damaged-agreement 0 --lost-agreement 0 "
    "--fail-on found "
    + " ".join(
        f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in FEW.items()
    )
)
"""The least that `dhbe erase` can do."""

ERASE = f"erase model.pt --input 3x16x16 {TINY} --out out"
SCORE = "score model.pt --input 3x16x16"
KNOWN = "--data data.npz --trigger badnets:3 --target 2"
ATTACK = "attack badnets --data data.npz --arch resnet8 --out out --epochs 1 --batch 8 --rate .1"


@cache
def small_state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return networks.build("resnet8", 3, (3, 16, 16)).state_dict()


def saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def packed(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def colours(count=60, classes=3, side=16):
    """Images that are mostly red, green or blue, by class: arrays of an .npz."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % classes
    images = random.integers(0, 100, (count, side, side, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels % 3] += 120
    return {"images": images, "labels": labels}


def listing(folder):
    """Everything below a folder, with the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with model.pt (resnet8, 3 classes, 3x16x16) and data.npz."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(saved(small_state()))
    (tmp_path / "data.npz").write_bytes(packed(**colours()))
    return tmp_path


@pytest.fixture
def dhbe(capsys):
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(command):
        capsys.readouterr()
        code = main(shlex.split(command))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def published(monkeypatch):
    """Files by name that a server on this machine has, its address, and as `asked` which of them were asked for."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            here.asked.append(self.path.removeprefix("/"))
            content = here.files.get(here.asked[-1])
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *said):
            """Says nothing."""

    here = SimpleNamespace(files={}, asked=[])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        here.address = f"http://127.0.0.1:{server.server_port}/"
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield here
        server.shutdown()
        thread.join()


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def double():
    """Everything in float64, so that tolerances can be tight."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def victim(side=8, classes=4, seed=0) -> Classifier:
    """A small network whose BatchNorm layers remember something, in eval mode."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(20):
            network(1.5 * torch.randn(16, 3, side, side) + 0.3)
        network[-1].weight.mul_(8)
    return Classifier(network, shape=(3, side, side), classes=classes, mean=MEAN, std=STD).eval()


QUICK = {
    "iterations": 3, "cycles": 2, "warm_up": 2, "student_steps": 2, "batch": 4, "pool_size": 10, "patch": 3, **FEW,
}  # fmt: skip


def tiny(defense, **values):
    """The same with settings that take no time, and some others."""
    return settings.changed(defense, QUICK | values)


def fast(**values):
    """The preset with some settings changed, of whatever group."""
    return settings.changed(FastDHBE(), values)


def image(side=16):
    return lambda path: Image.new("RGB", (side, side)).save(path)


def folder(**sides):
    """An image folder with one class for each name, of so many pixels; 0 leaves it empty."""

    def make(path):
        for name, side in sides.items():
            (path / name).mkdir(parents=True)
            if side:
                image(side)(path / name / "1.png")

    return make


GENERATOR = np.random.default_rng(0)


def random_pixels(*shape: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, shape, dtype=np.uint8)


def without_notes(err):
    """Notes are no progress: `--quiet` leaves them."""
    return [line for line in err.splitlines() if not line.startswith("note: ")]


@pytest.fixture
def store(tmp_path):
    """Where cases of the laboratory leave their records."""
    from dhbe.bench.store import Store

    return Store(tmp_path / "records", tmp_path / "work")
