"""Runs that began rightly and cannot be finished: a vendor's code, divergence, memory, a full disk."""

import errno
import gc
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ATTACK, ERASE, FEW, listing

from dhbe import records, runs
from dhbe.checkpoint import read
from dhbe.defenses import FastDHBE
from dhbe.errors import out_of_memory
from dhbe.search.survey import Survey


def sole_line(err):
    """What is said beside notes."""
    (line,) = [line for line in err.splitlines() if not line.startswith("note: ")]
    return line


def test_a_vendor_that_raises_in_the_run_is_one_line(here, dhbe):
    (here / "v.py").write_text(
        "from dhbe.networks.resnet import ResNet\n"
        "class Net(ResNet):\n"
        "    def forward(self, x):\n"
        "        assert len(x) == 4, 'four and no more'\n"
        "        return super().forward(x)\n"
        "def net(classes):\n"
        "    return Net((1, 1, 1), 16, classes)\n"
    )
    code, out, err = dhbe(f"{ERASE} --arch v.py:net --quiet")
    assert (code, out) == (4, "")
    assert re.fullmatch("dhbe: .*v.py:net.* AssertionError: four and no more.*", sole_line(err))
    assert not (here / "out").exists()


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_run_that_diverges_fails_in_one_line(rounds, here, dhbe):
    code, out, err = dhbe(f"{ERASE} --iterations {rounds} --lr 1e38 --quiet")
    assert (code, out) == (4, "")
    assert re.fullmatch("dhbe: .*(diverged|not finite).*", sole_line(err))
    assert not (here / "out/record.json").exists()


def test_too_large_for_memory_is_one_line(here, dhbe):
    official = "erase model.pt --input 3x16x16 --preset official --out out"
    for command in (f"{official} --batch {2**40}", f"{ATTACK} --crop {2**40}"):
        code, out, err = dhbe(f"{command} --quiet")
        assert (code, out, sole_line(err)) == (4, "", "dhbe: out of memory: lower --batch")
        assert not (here / "out").exists()


@pytest.mark.parametrize("file", [1, 2, 3, 4])  # checkpoint, weights, report, record
def test_a_full_disk_leaves_nothing_that_looks_finished(file, here, dhbe, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").is_file())
        if sum(synced) == file and synced[-1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    code, out, err = dhbe(f"{ERASE} --quiet")
    assert (code, out) == (4, "")
    assert re.fullmatch("dhbe: cannot write out/.*: no space left on device", sole_line(err))
    assert not (here / "out/record.json").exists()
    assert not list(here.rglob("*.tmp"))
    assert (here / "out").exists() == (file > 1)  # with a checkpoint there is something to resume from


def test_a_disk_that_is_really_full(here, dhbe):
    disk = here / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        code, out, err = dhbe(f"{ERASE.replace('--out out', '--out disk/out')} --quiet")
        assert (code, out) == (4, "")
        assert re.fullmatch("dhbe: cannot write disk/out/.*: no space left on device", sole_line(err))
        assert listing(disk) == {}
        (disk / "filler").write_bytes(bytes(508 * 1024))
        for command in (ERASE, ATTACK):
            code, out, err = dhbe(f"{command.replace('--out out', '--out disk/out')} --quiet")
            assert (code, out) == (4, "")
            assert sole_line(err)
            assert sorted(listing(disk)) == ["filler"]
    finally:
        gc.collect()
        subprocess.run(["umount", "-l", disk], check=True)


SMALL = "erase model.pt --input 3x8x8 --mean 0 --std 1 --iterations 2 --warm-up 2 --cycles 1 --anomaly-threshold 1e9 --damaged-agreement 0 --pool-size 32 --device cpu --precision fp32"
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
    code, _, errors = dhbe(f"{SMALL} --batch 32 --out halved")
    assert code == 0, errors
    assert "batches of 16" in errors
    assert "batches of 8" in errors
    record = records.read(Path("halved/record.json"))
    assert record.defense["batch"] == ROOM
    assert [point["iteration"] for point in record.curve] == list(range(1, record.iterations + 1))
    code, _, errors = dhbe(f"{SMALL} --batch {ROOM} --search-batch 32 --out asked")
    assert code == 0, errors
    halved, asked = (read(Path(name) / "clean.safetensors").tensors for name in ("halved", "asked"))
    assert all(torch.equal(halved[name], asked[name]) for name in asked)
    assert dhbe(f"{SMALL} --batch 32 --out halved --resume")[0] == 0, "it is finished, and as it was asked for"
    assert dhbe(f"{SMALL} --batch {ROOM} --out halved --resume")[0] == 2


def test_a_run_with_a_halved_batch_is_gone_on_with_as_it_is(here, dhbe, small_memory):
    command = f"{SMALL} --batch 32 --checkpoint-every 0"
    assert dhbe(f"{command} --out whole")[0] == 0
    looked, keep = [], runs.Run.keep

    def stop_later(self, state, *, last=False):
        looked.append(state()["halvings"])
        self.stopping = len(looked) == 5  # the third round with a batch of 8
        keep(self, state, last=last)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs.Run, "keep", stop_later)
        assert dhbe(f"{command} --out stopped")[0] == 130
    assert looked == [0, 1, 2, 2, 2]
    code, _, errors = dhbe(f"{command} --out stopped --resume")
    assert code == 0, errors
    assert "batches of 8" in errors
    whole, stopped = (read(Path(name) / "clean.safetensors").tensors for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_batch_that_is_far_too_large_fails_in_one_line(here, dhbe, small_memory):
    code, _, errors = dhbe(f"{SMALL} --batch 256 --pool-size 256 --out out")
    assert code == 4
    assert errors.strip().splitlines()[-1].endswith("lower --batch")
    assert not Path("out/clean.safetensors").exists()


SAID = [
    "could not create a primitive",
    "could not execute a primitive",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate",
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA driver error: out of memory",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    "MPS backend out of memory (MPS allocated: 18 GB)",
    "std::bad_alloc",
    "unable to mmap 1024 bytes from file <x>: Cannot allocate memory (12)",
    "Storage size calculation overflowed with sizes=[1073741824, 1073741824, 16]",
    "can't start new thread",
]


@pytest.mark.parametrize("said", SAID)
def test_every_way_in_which_torch_says_that_memory_ran_out_is_known(said):
    assert out_of_memory(RuntimeError(said))
    later = RuntimeError("the graph cannot be captured")
    later.__context__ = RuntimeError(said)
    assert out_of_memory(later)


@pytest.mark.parametrize("said", ["mat1 and mat2 shapes cannot be multiplied", "device-side assert triggered", ""])
def test_other_errors_are_not_taken_for_it(said):
    assert not out_of_memory(RuntimeError(said))


@pytest.mark.parametrize("verb", ["scan model.pt", "verify model.pt model.pt"])
def test_a_search_halves_its_batch_too(verb, here, dhbe, monkeypatch):
    whole = Survey.run

    def run(self, *args):
        for number, losses in enumerate(whole(self, *args)):
            if number and self.search_batch > ROOM:
                raise RuntimeError("could not create a primitive")
            yield losses

    monkeypatch.setattr(Survey, "run", run)
    few = " ".join(
        f"--{name.replace('_', '-')} {FEW[name]}" for name in ("second_rounds", "judged_images", "hunt_pieces")
    )
    command = f"{verb} --input 3x8x8 --mean 0 --std 1 --fail-on found --warm-up 2 --pool-size 32 --device cpu --precision fp32 {few}"
    code, _, errors = dhbe(f"{command} --search-batch 32 --out halved")
    assert code in (0, 1), errors
    assert "batches of 16" in errors
    assert "batches of 8" in errors
    record = records.read(Path("halved/record.json"))
    assert (record.defense["search_batch"], record.defense["asked_search_batch"]) == (ROOM, 32)
    assert [point["iteration"] for point in record.curve] == list(range(1, record.iterations + 1))
    code, out, errors = dhbe(f"{command} --search-batch 256 --pool-size 256 --out far")
    assert (code, out, errors.splitlines()[-1]) == (4, "", "dhbe: out of memory: lower --search-batch")
    assert not Path("far").exists()
