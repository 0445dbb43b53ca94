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
from conftest import FEW, listing, saved, small_state

from dhbe import records, runs, state_file
from dhbe.cli.resume import again
from dhbe.errors import Interrupted, Refused

QUICK = " ".join(
    f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
    for name, value in FEW.items()
    if name not in ("gain_images", "agreement_images", "seek_images")
)
"""Sample sizes of a search that take no time."""

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


SEARCH = f"--input 3x8x8 --mean 0 --std 1 --warm-up 3 --pool-size 16 --device cpu --precision fp32 --checkpoint-every 0 --quiet --fail-on found {QUICK}"
SEARCHES = {
    "scan": f"scan model.pt {SEARCH}",
    "verify": f"verify model.pt after.pt {SEARCH}",
}


def found(out):
    """What a search found, but for the time it took and the words that started it."""
    return records.read(out / "record.json").model_dump(exclude={"seconds", "finished", "memory", "command"})


@pytest.mark.parametrize("verb", SEARCHES)
def test_a_search_stopped_after_any_round_finds_the_same(verb, here, dhbe, monkeypatch):
    """Once in every round: each process does one more round and saves its state, as if killed right after."""
    monkeypatch.chdir(here)
    (here / "after.pt").write_bytes(saved({key: value * 1.01 for key, value in small_state().items()}))
    keep, kept = runs.Run.keep, []

    def killed(self, state, *, last=False):
        keep(self, state, last=True)
        if not last:
            kept.append(1)
            raise Interrupted("killed")

    assert dhbe(f"{SEARCHES[verb]} --out whole")[0] in (0, 1)
    with monkeypatch.context() as patched:
        patched.setattr(runs.Run, "keep", killed)
        for _ in range(len(found(here / "whole")["curve"])):
            code, _, said = dhbe(f"{SEARCHES[verb]} --out parts --resume")
            assert code == 130, said
    code, _, said = dhbe("resume parts")
    assert code in (0, 1), said
    assert found(here / "parts") == found(here / "whole")
    assert len(kept) == len(found(here / "whole")["curve"])
    before = (here / "parts/record.json").read_bytes()
    assert dhbe(f"{SEARCHES[verb]} --out parts --resume")[0] in (0, 1)
    assert (here / "parts/record.json").read_bytes() == before
    code, _, said = dhbe(f"{SEARCHES[verb]} --out parts --resume --seed 1")
    assert (code, "other settings (seed: 0 then, 1 now)" in said) == (2, True), said


def test_a_search_is_not_resumed_for_another_cleaned_model(here, dhbe, monkeypatch):
    monkeypatch.chdir(here)
    assert dhbe(f"{SEARCHES['verify'].replace('after.pt', 'model.pt')} --out out")[0] in (0, 1)
    (here / "after.pt").write_bytes(saved({key: value * 1.01 for key, value in small_state().items()}))
    code, _, said = dhbe(f"{SEARCHES['verify']} --out out --resume")
    assert (code, "after_sha256" in said) == (2, True), said


def test_a_demo_resumes_in_either_half(here, monkeypatch):
    """While it trains, while it erases, and between the two, when no state is there."""
    monkeypatch.chdir(here)
    command, words = "dhbe demo --out out --seed 3", ["demo", "--out", "out", "--seed", "3", "--resume"]
    for place in ("out/victim/checkpoint/state.pt", "out/checkpoint/state.pt"):
        Path(place).parent.mkdir(parents=True)
        state_file.write(Path(place), "{}", {"command": command})
        assert again(Path("out")) == words
        Path(place).unlink()
    with pytest.raises(Refused, match="no interrupted run"):
        again(Path("out"))
    planted = records.read(Path(__file__).parents[1] / "zoo/badnets-3.json").model_copy(update={"command": command})
    records.write(Path("out/victim/record.json"), planted)
    assert again(Path("out")) == words
