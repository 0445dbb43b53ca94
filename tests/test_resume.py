"""Runs that are stopped at any moment, in processes of their own."""

import contextlib
import multiprocessing
import os
import random
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
from conftest import listing, saved, small_state

KILLS = int(os.environ.get("DHBE_KILLS", "4"))
LONG = (
    "--iterations 8 --warm-up 4 --batch 8 --pool-size 16 --anomaly-threshold 1e9 --damaged-agreement 0 --fail-on found"
)
ERASE = f"erase model.pt --input 3x8x8 {LONG} --device cpu --precision fp32 --checkpoint-every 0"

# Its processes are forked from one that has imported everything, and so begin at once.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["dhbe.cli", "dhbe.api", "torch._dynamo", "matplotlib.figure"])
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see which signals are caught")


def obey(command, folder):
    """The body of a process: one command, with its output in files."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    import torch

    from dhbe.cli import main

    torch.set_num_threads(1)
    os._exit(main(shlex.split(command)))


class Started:
    def __init__(self, command, folder):
        self.folder = folder
        self.process = SERVER.Process(target=obey, args=(command, str(folder)))
        self.process.start()

    def ended(self):
        """Exit code and stderr, but for notes."""
        self.process.join(120)
        said = (self.folder / "stderr").read_text().splitlines(keepends=True)
        return self.process.exitcode, "".join(line for line in said if not line.startswith("note: "))

    def until(self, path):
        """Waits for a file that the run writes."""
        while not path.exists():
            assert self.process.is_alive()
            time.sleep(0.005)
        return self

    def listening(self):
        """Waits until SIGTERM is no longer deadly: the run has its folder and is about to begin."""
        status = Path(f"/proc/{self.process.pid}/status")
        while not int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16) >> (signal.SIGTERM - 1) & 1:
            assert self.process.is_alive()
            time.sleep(0.005)
        return self

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        return self


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody interrupted, and how many seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "model.pt").write_bytes(saved(small_state()))
    Started("doctor", folder).ended()  # wakes the server
    began = time.monotonic()
    assert Started(f"{ERASE} --out out", folder).ended()[0] == 0
    return folder / "out", time.monotonic() - began


@pytest.fixture
def here(tmp_path):
    (tmp_path / "model.pt").write_bytes(saved(small_state()))
    return tmp_path


def weights(folder):
    return (folder / "clean.safetensors").read_bytes()


def test_a_run_killed_again_and_again_comes_to_the_same_weights(whole, here):
    """Each time at a random moment, from the first second to the writing of the results."""
    finished, seconds = whole
    moments, kills, out = random.Random(0), 0, here / "out"
    while kills < KILLS:
        run = Started(f"{ERASE} --out out --resume", here)
        run.process.join(moments.uniform(0, 1.2 * seconds if kills % 2 else 0.5 * seconds))
        kills += run.process.is_alive()
        run.send(signal.SIGKILL).process.join()
        if run.process.exitcode == 0:  # it was quicker: its result is judged, and the next one begins
            assert weights(out) == weights(finished)
            out.rename(here / f"out{kills}-{time.monotonic_ns()}")
        else:
            assert run.process.exitcode == -signal.SIGKILL
    assert Started(f"{ERASE} --out out --resume --quiet", here).ended() == (0, "")
    assert weights(out) == weights(whole[0])


def test_a_finished_run_is_recognised_and_not_repeated(whole):
    out = whole[0]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.is_file()}
    for other, code, message in (
        ("", 0, ""),
        ("--seed 1", 2, "finished run with other settings (seed: 0 then, 1 now)"),
        ("--patch 3", 2, "finished run with other settings (patch: 5 then, 3 now)"),
        ("--input 3x16x16", 2, "finished run with other settings (input"),
        ("--mean .5", 2, "finished run with other settings (mean"),
    ):
        ended = Started(f"{ERASE} --out out --resume --quiet {other}", out.parent).ended()
        assert ended[0] == code, ended
        assert message in ended[1]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert sorted(listing(out)) == ["clean.pt", "clean.safetensors", "record.json", "report.html"]


def test_overwriting_begins_anew_and_the_old_results_stay_until_the_new_ones_are_complete(whole, here):
    out = here / "out"
    assert Started(f"{ERASE} --out out --seed 1", here).ended()[0] == 0
    other = listing(out)
    assert weights(out) != weights(whole[0])
    run = Started(f"{ERASE} --out out --overwrite", here).until(out / "checkpoint" / "state.pt")
    run.send(signal.SIGKILL).ended()
    assert other.items() <= listing(out).items()
    code, said = Started(f"{ERASE} --out out", here).ended()
    assert code == 2
    assert "out holds an interrupted run: add --resume to resume it, --overwrite to start over" in said
    assert Started(f"{ERASE} --out out --resume", here).ended()[0] == 0
    assert weights(out) == weights(whole[0])
    assert sorted(listing(out)) == sorted(other)
    assert Started(f"{ERASE} --out out --resume --quiet", here).ended() == (0, "")


def test_two_processes_in_one_folder(here):
    first = Started(f"{ERASE} --out out --iterations 100000 --yes --quiet", here).until(
        here / "out" / "checkpoint" / "state.pt"
    )
    code, said = Started(f"{ERASE} --out out --resume --quiet", here).ended()
    assert (code, said) == (2, "dhbe: another process is working in out: wait for it, or give another --out\n")
    assert first.process.is_alive()
    assert first.send(signal.SIGTERM).ended()[0] == 130


@LINUX
def test_an_attack_that_is_stopped_leaves_nothing(here):
    epochs = "--epochs 1000 --batch 64 --rate .1 --min-asr 0"
    run = Started(f"attack badnets --data digits16 --arch resnet8 --out practice/one {epochs}", here)
    code, said = run.listening().send(signal.SIGTERM).ended()
    assert code == 130
    assert re.search("^dhbe: interrupted", said, re.MULTILINE)
    assert not (here / "practice").exists()
