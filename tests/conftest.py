"""What the tests of whole commands share: a small victim, small data, and a place of their own."""

import io
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from dhbe import networks
from dhbe.cli import main

TINY = "--iterations 2 --warm-up 1 --batch 8 --album 16"
"""The least that `dhbe erase` can do."""


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
