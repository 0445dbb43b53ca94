"""Runs that the memory does not suffice for."""

from pathlib import Path

import pytest
import torch

from dhbe import records
from dhbe.checkpoint import read
from dhbe.defenses import FastDHBE

ERASE = "erase model.pt --input 3x8x8 --iterations 2 --warm-up 2 --cycles 1 --album 32 --device cpu --precision fp32"
ROOM = 8


@pytest.fixture
def small_memory(monkeypatch):
    """A machine on which batches of more than 8 images run out of memory after their first round."""
    whole = FastDHBE.run

    def run(self, *args):
        for number, losses in enumerate(whole(self, *args)):
            if number and self.batch > ROOM:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            yield losses

    monkeypatch.setattr(FastDHBE, "run", run)


def test_the_batch_is_halved_until_it_fits_and_the_user_is_told(here, dhbe, small_memory):
    code, _, errors = dhbe(f"{ERASE} --batch 32 --out halved")
    assert code == 0, errors
    assert "batches of 16" in errors
    assert "batches of 8" in errors
    record = records.read(Path("halved/record.json"))
    assert record.defense["batch"] == ROOM
    assert [point["iteration"] for point in record.curve] == list(range(1, record.iterations + 1))
    code, _, errors = dhbe(f"{ERASE} --batch {ROOM} --out asked")
    assert code == 0, errors
    halved, asked = (read(Path(name) / "clean.safetensors").tensors for name in ("halved", "asked"))
    assert all(torch.equal(halved[name], asked[name]) for name in asked)


def test_a_batch_that_is_far_too_large_fails_in_one_line(here, dhbe, small_memory):
    code, _, errors = dhbe(f"{ERASE} --batch 256 --album 256 --out out")
    assert code == 4
    assert errors.strip().splitlines()[-1].endswith("lower --batch")
    assert not Path("out/clean.safetensors").exists()
