"""Run folders from elsewhere, and files of the user that lie where results go."""

import copy
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import ATTACK, ERASE, colours, listing, packed, saved, small_state, without_notes

from dhbe import runs, state_file
from dhbe.cli import main
from dhbe.cli.resume import again

LONG = ERASE.replace("--iterations 2", "--iterations 4") + " --device cpu --precision fp32 --quiet"
STATE = runs.CHECKPOINT


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The state of a run that was stopped after its second round."""
    folder, looked, keep = tmp_path_factory.mktemp("interrupted"), [], runs.Run.keep

    def stop(self, state, *, last=False):
        looked.append(1)
        self.stopping = len(looked) == 2
        keep(self, state, last=last)

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        (folder / "model.pt").write_bytes(saved(small_state()))
        patched.setattr(runs.Run, "keep", stop)
        assert main(shlex.split(LONG)) == 130
    return (folder / "out" / STATE).read_bytes()


@pytest.fixture
def folder(here, interrupted):
    (here / "out" / STATE.parent).mkdir(parents=True)
    (here / "out" / STATE).write_bytes(interrupted)
    return here


def nested(depth):
    found = ()
    for _ in range(depth):
        found = (found,)
    return found


def change(state, path, value):
    *keys, last = path.split(".")
    for key in keys:
        state = state[key]
    if value is MISSING:
        del state[last]
    else:
        state[last] = value


MISSING = object()
RANDOM = torch.get_rng_state()
EDITS = {
    "no settings": ("settings", MISSING),
    "settings of another type": ("settings", 7),
    "settings that are no object": ("settings", "[]"),
    "no state": ("run_state", MISSING),
    "a state of another type": ("run_state", [1, 2]),
    "no round": ("run_state.round", MISSING),
    "a negative round": ("run_state.round", -1),
    "a round of another type": ("run_state.round", "2"),
    "a broken round": ("run_state.round", 1.5),
    "a round beyond the last": ("run_state.round", 10**9),
    "a round that was not": ("run_state.round", 1),
    "no parts": ("run_state.parts", MISSING),
    "parts of another type": ("run_state.parts", []),
    "a part of another type": ("run_state.parts.student", 3),
    "a part without weights": ("run_state.parts.student", {}),
    "weights of another shape": ("run_state.parts.student", {"network.fc.bias": torch.ones(7)}),
    "no random state": ("run_state.random", {}),
    "a short random state": ("run_state.random", {"cpu": RANDOM[:100]}),
    "a random state of another type": ("run_state.random", {"cpu": RANDOM.float()}),
    "no curve": ("curve", MISSING),
    "a short curve": ("curve", []),
    "a curve of another type": ("curve", [{"iteration": "1"}, {"iteration": "2"}]),
    "a curve that is not finite": ("curve", [{"iteration": 1, "loss": float("nan")}, {"iteration": 2}]),
    "negative seconds": ("seconds", -1.0),
    "seconds of another type": ("seconds", "soon"),
    "halvings beyond all": ("halvings", 10**9),
    "a deep key": ("extra", {nested(200): 1}),
}


def refused(dhbe, here, command=f"{LONG} --resume"):
    before = listing(here)
    code, out, err = dhbe(command)
    assert (code, out, len(without_notes(err))) == (2, "", 1), err
    assert listing(here) == before
    return err


@pytest.mark.parametrize("case", EDITS)
def test_a_state_that_was_edited_is_not_gone_on_with(case, folder, interrupted, dhbe):
    path = folder / "out" / STATE
    content = copy.deepcopy(state_file.read(path))
    change(content, *EDITS[case])
    settings = content.pop("settings", None)
    if settings is None:
        content["settings"] = None  # `write` puts it there
    state_file.write(path, settings, content)
    said = refused(dhbe, folder)
    assert "cannot resume from out/checkpoint/state.pt" in said or "of the saved run does not fit" in said
    assert "--overwrite" in said


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


RAW = {
    "one bit": flipped,
    "the last byte": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "half": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
    "no checksum": lambda content: content[len(state_file.MAGIC) + 65 :],
    "another checksum": lambda content: content.replace(content[13:77], b"0" * 64),
    "a pickle": lambda content: pickle.dumps({"settings": "{}"}),
    "a zip": lambda content: saved({"settings": "{}"}),
}


@pytest.mark.parametrize("case", RAW)
def test_one_bit_is_enough(case, folder, interrupted, dhbe):
    (folder / "out" / STATE).write_bytes(RAW[case](interrupted))
    assert "cannot resume from" in refused(dhbe, folder)
    assert "cannot resume from" in refused(dhbe, folder, LONG)
    assert dhbe(f"{LONG} --overwrite")[0] == 0


def test_the_state_that_nobody_edited_is(folder, dhbe):
    code, _, err = dhbe(f"{LONG} --resume")
    assert (code, without_notes(err)) == (0, [])
    resumed = (folder / "out" / "clean.safetensors").read_bytes()
    assert dhbe(f"{LONG} --overwrite")[0] == 0
    assert (folder / "out" / "clean.safetensors").read_bytes() == resumed


def linked(place, folder):
    """What lies at `place` in the run's folder lies elsewhere now, behind a link."""
    elsewhere = folder / "elsewhere"
    if place.exists():
        place.rename(elsewhere)
    else:
        elsewhere.touch()
    place.symlink_to(elsewhere)


@pytest.mark.parametrize("place", [".lock", "checkpoint", "checkpoint/state.pt"])
@pytest.mark.parametrize("mode", ["", "--resume"])
def test_links_in_a_run_folder_are_not_followed(place, mode, folder, dhbe):
    linked(folder / "out" / place, folder)
    refused(dhbe, folder, f"{LONG} {mode}")


@pytest.mark.parametrize("place", ["checkpoint/state.pt", "record.json"])
@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_pipes_and_devices_in_a_run_folder_are_not_waited_for(place, kind, folder, dhbe):
    path = folder / "out" / place
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    code, _, err = dhbe(f"{LONG} --resume")
    assert (code, len(without_notes(err))) == (2, 1)
    assert "regular file" in err


MODEL = "--input 3x16x16 --iterations 2 --warm-up 1 --batch 8 --pool-size 16 --out out"
SEARCH = "--input 3x16x16 --warm-up 1 --search-batch 8 --pool-size 16 --out out"
LOST = {
    "the model is the report": ("out/report.html", f"erase out/report.html {MODEL}"),
    "the model is the record": ("out/record.json", f"erase out/record.json {MODEL}"),
    "the model is the result": ("out/clean.safetensors", f"erase out/clean.safetensors {MODEL}"),
    "the model is the state": ("out/checkpoint/state.pt", f"erase out/checkpoint/state.pt {MODEL}"),
    "the model lies beside the state": ("out/checkpoint/m.pt", f"erase out/checkpoint/m.pt {MODEL}"),
    "the model is the lock": ("out/.lock", f"erase out/.lock {MODEL}"),
    "a search": ("out/report.html", f"scan out/report.html {SEARCH}"),
    "the model after": ("out/report.html", f"verify model.pt out/report.html {SEARCH}"),
    "a defence": ("out/clean.safetensors", "defend clp out/clean.safetensors --input 3x16x16 --out out"),
    "a clean model": ("out/backdoored.safetensors", f"{ATTACK} --clean out/backdoored.safetensors"),
}


@pytest.mark.parametrize("mode", ["", "--overwrite"])
@pytest.mark.parametrize("case", LOST)
def test_what_was_an_input_is_never_replaced(case, mode, here, dhbe):
    place, command = LOST[case]
    (here / place).parent.mkdir(parents=True)
    write = safetensors.torch.save if place.endswith(".safetensors") else saved
    (here / place).write_bytes(write(small_state()))
    said = refused(dhbe, here, f"{command} {mode} --quiet")
    assert "would be replaced in out: give another --out" in said or "cannot write into" in said


def test_a_link_hides_no_input(here, dhbe):
    (here / "out").mkdir()
    (here / "model.pt").unlink()
    (here / "out/clean.safetensors").write_bytes(safetensors.torch.save(small_state()))
    (here / "model.pt").symlink_to("out/clean.safetensors")
    assert "would be replaced" in refused(dhbe, here, f"{ERASE} --overwrite --quiet")


@pytest.mark.parametrize("place", ["out/record.json", "out/report.html"])
def test_data_and_triggers_are_inputs_too(place, here, dhbe):
    (here / "out").mkdir()
    (here / place).write_bytes(packed(**colours()))
    (here / "data.npz").unlink()
    (here / "data.npz").symlink_to(place)
    assert "would be replaced" in refused(dhbe, here, f"{ERASE} --overwrite --data data.npz --quiet")


def test_an_attack_that_misses_leaves_the_old_results(here, dhbe):
    assert dhbe(f"{ATTACK} --force --quiet")[0] == 0
    before = listing(here)
    code, _, err = dhbe(f"{ATTACK} --seed 1 --overwrite --quiet")
    assert code == 4, err
    assert listing(here) == before


@pytest.mark.parametrize("when", [0, 2])
def test_results_that_cannot_all_be_moved_leave_no_record_of_others(when, here, dhbe, monkeypatch):
    """Whatever moment the machine stops at, a record in the folder belongs to the files beside it."""
    assert dhbe(f"{LONG} --seed 1")[0] == 0
    old = listing(here / "out")
    moved, replace = [], type(here).replace

    def stops(self, target):
        if self.parent.name == runs.STAGE.name and target.parent != self.parent:
            if len(moved) == when:
                raise KeyboardInterrupt
            moved.append(self.name)
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(here), "replace", stops)
        code = dhbe(f"{LONG} --overwrite")[0]
    assert code == 130
    assert "record.json" not in listing(here / "out")
    assert dhbe(f"{LONG} --resume")[0] == 0
    assert sorted(listing(here / "out")) == sorted(old)
    assert (here / "out/clean.safetensors").read_bytes() != old["clean.safetensors"]
    assert json.loads((here / "out/record.json").read_text())["seed"] == 0


def test_resume_takes_the_command_from_the_state_and_runs_no_code_that_it_names(here, dhbe):
    state = here / "out" / runs.CHECKPOINT
    state.parent.mkdir(parents=True)
    state_file.write(state, "{}", {"replaces": "", "command": "dhbe erase model.pt --input 3x16x16"})
    assert again(here.__class__("out")) == ["erase", "model.pt", "--input", "3x16x16", "--out", "out", "--resume"]
    for command, said in (
        ("dhbe erase model.pt --arch evil.py:net", "code that the folder names"),
        ("rm -rf x", "lacks its command"),
    ):
        state_file.write(state, "{}", {"replaces": "", "command": command})
        code, _, err = dhbe("resume out")
        assert (code, said in err) == (2, True)
    code, _, err = dhbe("resume elsewhere")
    assert (code, "holds no interrupted run" in err) == (2, True)


STOPPED = """
import hashlib, os, sys
from pathlib import Path
from dhbe import runs
from dhbe.errors import Interrupted

os.chdir(sys.argv[2])
try:
    with runs.opened(Path("out"), {}, every=0) as run:
        run.keep(lambda: {"told": 1})
        print("begins", file=sys.stderr, flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))  # one long call that hears of no signal
        print("the batch is over", file=sys.stderr, flush=True)
        while True:
            run.keep(lambda: {"told": 2})
except Interrupted as error:
    print(error, file=sys.stderr)
"""
ROUND = "stopping after this round; press Ctrl-C again to stop after this batch"
BATCH = "stopping after this batch; press Ctrl-C again to quit at once"
SAVED = "interrupted; the state is saved in out"
ASKED = {
    "once": (1, 10**6, [ROUND, "the batch is over", SAVED]),
    "twice within a batch": (2, 3 * 10**6, [ROUND, BATCH, SAVED]),
    "three times": (3, 2 * 10**9, [ROUND, BATCH]),  # it would go on for half an hour
}


@pytest.mark.parametrize("case", ASKED)
def test_ctrl_c_is_answered_before_the_batch_is_over(case, tmp_path):
    times, length, expected = ASKED[case]
    said = []
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(length), str(tmp_path)], stderr=subprocess.PIPE, text=True
    ) as process:
        told = (line.strip() for line in process.stderr if line.strip())
        assert next(told) == "begins"
        for number in range(times):
            process.send_signal(signal.SIGINT)
            said += [next(told)] if number < 2 else []
        said += told
    assert said == expected
    assert process.returncode == (130 if times == 3 else 0)
    assert state_file.read(tmp_path / "out" / runs.CHECKPOINT)["told"] == (2 if times == 1 else 1)
