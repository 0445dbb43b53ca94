import errno
import gc
import json
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, colours, listing, packed, saved, small_state
from PIL import Image

from dhbe import cli, networks, records
from dhbe.attacks import ALL as ATTACKS

DHBE = Path(sys.executable).with_name("dhbe")
ERASE = f"erase model.pt --input 3x16x16 {TINY} --out out"
SCORE = "score model.pt --input 3x16x16"
KNOWN = "--data data.npz --trigger badnets:3 --target 2"
ATTACK = "attack badnets --data data.npz --arch resnet8 --out out --epochs 1 --batch 8 --rate .1"


class Touches:
    """A pickle of it leaves a file behind if it is opened carelessly."""

    def __reduce__(self):
        return os.system, ("touch canary",)


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


def text_among_images(path):
    folder(a=16, b=16)(path)
    (path / "a" / "readme.txt").write_text("not an image")


def finished(path):
    path.mkdir()
    (path / "record.json").write_text("{}")


def interrupted(path, settings='{"seed": 1}'):
    (path / "checkpoint").mkdir(parents=True)
    torch.save({"settings": settings}, path / "checkpoint" / "state.pt")


def broken_checkpoint(path):
    (path / "checkpoint").mkdir(parents=True)
    (path / "checkpoint" / "state.pt").write_bytes(b"PK\x03\x04")


def zip_with_a_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Touches()))


LIE = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
STATE = small_state()
DATA = colours()
BROKEN = STATE | {"fc.bias": torch.tensor([0, torch.nan, 0])}
RAISES = b"def net(classes):\n    raise RuntimeError('no\\nnetwork today')\n"
EXITS = b"raise SystemExit(2)\n"
NARROW = b"import torch\ndef net(classes):\n    return torch.nn.Linear(5, classes)\n"

# What lies in the folder, the command, and what must be said. A string of bytes is a file's content.
REFUSED = {
    # The model file
    "pickle in a zip": ({"model.pt": saved(Touches())}, ERASE, r"asks to import .*system; nothing was run"),
    "pickle in a legacy file": (
        {"model.pt": saved(Touches(), _use_new_zipfile_serialization=False)}, ERASE, r"asks to import .*system",
    ),
    "pickle among weights": ({"model.pt": saved({"net": STATE, "x": [Touches()]})}, ERASE, r"asks to import .*system"),
    "pickle made by hand": ({"model.pt": zip_with_a_pickle}, ERASE, r"asks to import .*system"),
    "bare pickle": ({"model.pt": pickle.dumps(Touches())}, SCORE + " --data data.npz", r"asks to import .*system"),
    "whole network": ({"model.pt": saved(networks.build("resnet8", 3, (3, 16, 16)))}, ERASE, "whole pickled network"),
    "truncated zip": ({"model.pt": saved(STATE)[:-500]}, ERASE, "broken, truncated"),
    "truncated tensors": ({"m.safetensors": safetensors.torch.save(STATE)[:-9]}, "erase m.safetensors", "truncated"),
    "lying header": ({"m.safetensors": struct.pack("<Q", len(LIE)) + LIE}, "erase m.safetensors", "broken, truncated"),
    "empty": ({"model.pt": b""}, ERASE, "model.pt is empty"),
    "folder": ({}, "erase .", "is a folder: name the checkpoint file itself"),
    "missing": ({}, "erase nowhere.pt", "cannot read nowhere.pt: No such file"),
    "zero in the name": ({}, "erase 'a\0b'", "cannot read"),
    "name too long": ({}, f"erase {'n' * 999}", "cannot read"),
    "lfs": ({"model.pt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}, ERASE, "git lfs pull"),
    "picture": ({"model.pt": b"\x89PNG\r\n\x1a\n"}, ERASE, "broken, truncated or no checkpoint"),
    "nan": ({"model.pt": saved(BROKEN)}, ERASE, "NaN or infinite weights in fc.bias"),
    # What it is taken for
    "wrong architecture": ({}, f"{ERASE} --arch wrn16-1", "does not fit the network .*check --arch"),
    "unknown architecture": ({}, f"{ERASE} --arch resnet9000", "unknown architecture 'resnet9000': give one of"),
    "untold architecture": ({"model.pt": saved({"w": torch.ones(3, 3)})}, ERASE, "add --arch"),
    "wrong classes": ({}, f"{ERASE} --classes 4", r"wrong shape: fc.weight \[3, 64\] for \[4, 64\]"),
    "one class": ({}, f"{ERASE} --classes 1", "1 is not between 2 and 100,000"),
    "no vendor file": ({}, f"{ERASE} --arch vendor.py:net", "vendor.py, which is no file"),
    "no vendor module": ({}, f"{ERASE} --arch vendor.models:net", "vendor.models:net fails: ModuleNotFoundError"),
    "no such function": ({"v.py": RAISES}, f"{ERASE} --arch v.py:other", "no function 'other'; it has net"),
    "function raises": ({"v.py": RAISES}, f"{ERASE} --arch v.py:net", "v.py:net fails: RuntimeError: no network today"),
    "vendor exits": ({"v.py": EXITS}, f"{ERASE} --arch v.py:net", "v.py:net fails: SystemExit"),
    "not code": ({"v.py": b"\x00\xff"}, f"{ERASE} --arch v.py:net", "v.py:net fails: "),
    "another's network": ({"v.py": NARROW}, f"{ERASE} --arch v.py:net", "does not fit the network"),
    "channels": ({}, f"erase model.pt --input 2x32x32 {TINY}", "does not fit the network|1 or 3 channels"),
    "no pixels": ({}, "erase model.pt --input 3x0x32", "'3x0x32' is no shape"),
    "too small": ({}, "erase model.pt --input 3x7x7", "--input 3x7x7: images are made square, of 8 px or more"),
    "no shape": ({}, "erase model.pt --input abc", "'abc' is no shape CHANNELSxHEIGHTxWIDTH"),
    "not square": ({}, "erase model.pt --input 3x32x16", "images are made square"),
    "two means": ({}, f"{ERASE} --mean .4 .5", "--mean has 2 values, the images 3 channels"),
    "mean of words": ({}, f"{ERASE} --mean red", "argument --mean: 'red' is no number"),
    "mean of nothing": ({}, f"{ERASE} --mean nan", "argument --mean"),
    "std 0": ({}, f"{ERASE} --std 0", "--std must be positive, not 0"),
    "std infinite": ({}, f"{ERASE} --std inf", "argument --std"),
    "std of almost nothing": ({}, f"{ERASE} --std 1e-60", "--std 1e-60: pixels in"),
    # Data
    "no such data": ({}, f"{SCORE} --data nowhere", "no data called 'nowhere'"),
    "no data": ({}, SCORE, "required: --data"),
    "text among images": ({"d": text_among_images}, f"{SCORE} --data d", "readme.txt is no image"),
    "empty class": ({"d": folder(a=16, b=0)}, f"{SCORE} --data d", "b is empty"),
    "file beside the classes": ({"d": folder(a=16), "d/x.png": image()}, f"{SCORE} --data d", "lies beside the class"),
    "mixed sizes": ({"d": folder(a=16, b=8, c=9)}, ATTACK + " --data d", "mixed sizes: .* resize, or give --input"),
    "objects": (
        {"d.npz": packed(images=np.array([Touches()], object), labels=DATA["labels"])}, f"{SCORE} --data d.npz",
        "images holds Python objects, which could run code",
    ),
    "no npz": ({"d.npz": b"PK\x03\x04"}, f"{SCORE} --data d.npz", "not a whole .npz"),
    "npz of floats": (
        {"d.npz": packed(images=DATA["images"] / 255, labels=DATA["labels"])}, f"{SCORE} --data d.npz", "not uint8",
    ),
    "npz of another size": ({"d.npz": packed(**colours(side=8))}, f"{SCORE} --data d.npz", "images are 3x8x8, the clas"),
    "labels out of range": (
        {"d.npz": packed(**colours(classes=4))}, f"{SCORE} --data d.npz", "labels up to 3, the model 3 classes",
    ),
    "one class only": (
        {"d.npz": packed(images=DATA["images"], labels=0 * DATA["labels"])},
        f"{ERASE} --data d.npz --trigger badnets:3 --target 0", "no image outside class 0",
    ),
    # Trigger and target
    "trigger without data": ({}, f"{ERASE} --trigger badnets:3 --target 0", "need --data"),
    "trigger without target": ({}, f"{SCORE} --data data.npz --trigger badnets:3", "both --trigger and --target"),
    "trigger too large": ({}, f"{SCORE} --data data.npz --trigger badnets:17 --target 0", "side 17 does not fit"),
    "unknown trigger": ({}, f"{SCORE} --data data.npz --trigger wanet --target 0", "no trigger 'wanet'; give badnets"),
    "unknown style": ({}, f"{SCORE} --data data.npz --trigger badnets:3:red --target 0", "no trigger style 'red'"),
    "empty trigger": ({}, f"{SCORE} --data data.npz --trigger '' --target 0", "trigger"),
    "trigger file": ({"t.json": b"[[["}, f"{SCORE} --data data.npz --trigger t.json --target 0", "no trigger as dhbe"),
    "target too high": ({}, f"{SCORE} --data data.npz --trigger badnets:3 --target 3", "no target class 3: .* 0 to 2"),
    "target below 0": ({}, f"{SCORE} --data data.npz --trigger badnets:3 --target -1", "no target class -1"),
    "gate without data": ({}, f"{ERASE} --max-asr .1", "--max-asr needs --data, --trigger and --target"),
    "gate without trigger": ({}, f"{ERASE} --max-asr .1 --data data.npz", "--max-asr needs"),
    "accuracy without data": ({}, f"{ERASE} --min-acc .1", "--min-acc needs --data"),
    "gate in percent": ({}, f"{ERASE} {KNOWN} --max-asr 5", "5 is not between 0 and 1"),
    "gate of nothing": ({}, f"{ERASE} {KNOWN} --max-asr nan", "nan is not between 0 and 1"),
    # The folder for the results
    "file in the way": ({"out": b""}, ERASE, "cannot write into out: file exists"),
    "under a file": ({"out": b""}, f"{ERASE}/deeper", "cannot write into out/deeper: not a directory"),
    "out too long": ({}, f"{ERASE}{'t' * 999}", "cannot write into out.*file name too long"),
    "out with a zero": ({}, ERASE.replace("--out out", "--out 'o\0ut'"), "cannot write into .*: impossible name"),
    "finished run": ({"out": finished}, ERASE, "out holds a finished run: add --overwrite to begin anew, or"),
    "broken record": ({"out": finished}, f"{ERASE} --resume", "out/record.json is no record of dhbe"),
    "interrupted run": ({"out": interrupted}, ERASE, "holds an interrupted run: add --resume to go on"),
    "other settings": ({"out": interrupted}, f"{ERASE} --resume", "holds a run of other settings"),
    "broken checkpoint": ({"out": broken_checkpoint}, f"{ERASE} --resume", "cannot be read: add --overwrite"),
    "resume and overwrite": ({}, f"{ERASE} --resume --overwrite", "not allowed with"),
    "onto itself": (
        {"out": lambda path: path.mkdir(), "out/clean.safetensors": safetensors.torch.save(STATE)},
        f"erase out/clean.safetensors --input 3x16x16 {TINY} --out out --overwrite", "is the model itself",
    ),
    "attack onto a run": ({"out": finished}, ATTACK, "holds a finished run"),
    "attack into a file": ({"out": b""}, ATTACK, "cannot write into out"),
    # Options
    "unknown verb": ({}, "erradicate model.pt", "no verb 'erradicate'; there are erase, scan, verify, "),
    "unknown option": ({}, f"{ERASE} --frobnicate", "unrecognized arguments: --frobnicate"),
    "abbreviated option": ({}, f"{ERASE} --iter 3", "unrecognized arguments: --iter"),
    "unknown preset": ({}, f"{ERASE} --preset best", "invalid choice: 'best'"),
    "no model": ({}, "erase", "required: MODEL"),
    "batch 0": ({}, f"{ERASE} --batch 0", "--batch 0: it must be a number of at least 4"),
    "batch beyond all": ({}, f"{ERASE} --batch {10**30}", "argument --batch: 10+ is not between"),
    "album beyond all": ({}, f"{ERASE} --album {10**30}", "argument --album: 10+ is not between"),
    "batch of words": ({}, f"{ERASE} --batch many", "argument --batch: 'many' is no whole number"),
    "patch 40": ({}, f"{ERASE} --patch 40", "--patch 40: a trigger must have 1 to 16 px"),
    "lr of nothing": ({}, f"{ERASE} --lr nan", "argument --lr: nan is not between"),
    "seed -1": ({}, f"{ERASE} --seed -1", "-1 is not between 0 and"),
    "seed of words": ({}, f"{ERASE} --seed x", "argument --seed: 'x' is no whole number"),
    "checkpoint never": ({}, f"{ERASE} --checkpoint-every nan", "argument --checkpoint-every"),
    "no such device": ({}, f"{ERASE} --device cuda:7", "no device 'cuda:7' here"),
    "device of words": ({}, f"{ERASE} --device toaster", "no device 'toaster' here"),
    "device without memory": ({}, f"{ERASE} --device meta", "no device 'meta' here"),
    "unknown attack": ({}, "attack wannet", "no attack 'wannet'; there are badnets"),
    "attack, architecture": ({}, f"{ATTACK} --arch resnet9000", "unknown architecture"),
    "attack, rate": ({}, f"{ATTACK} --rate 2", "a poison rate of 2 asks for 96 of 48"),
    "attack, epochs": ({}, f"{ATTACK} --epochs 0", "at least 1 epoch"),
    "attack, target": ({}, f"{ATTACK} --target 3", "no target class 3"),
    "attack, shape": ({}, f"{ATTACK} --input 3x8x8", "the images are 3x16x16, the classifier takes 3x8x8"),
    "attack, data of one class": (
        {"data.npz": packed(images=DATA["images"], labels=0 * DATA["labels"])}, ATTACK, "of which 0 lie outside the target class 0",
    ),
    "attack, source": ({}, f"{ATTACK} --goal one-to-one --source 9", "no source class 9"),
    "attack, goal": ({}, f"{ATTACK} --goal some-to-one", "invalid choice: 'some-to-one'"),
    "attack, patch": ({}, f"{ATTACK} --side 17", "side 17 does not fit into an image of 16 x 16"),
    "attack, nothing to tune": ({}, f"{ATTACK} --fine-tune", "there must be a clean model: give --clean"),
    "attack, no clean model": ({}, f"{ATTACK} --clean nowhere.pt", "cannot read nowhere.pt"),
    "attack, another clean model": ({}, f"{ATTACK} --clean model.pt --arch wrn16-1", "clean model is a resnet8 of 3 .*must agree"),
    "attack, too few of a class": (
        {}, ATTACK.replace("badnets", "clean-label") + " --rate .9", "asks for 43 of 48 images, of which 16 lie in the target",
    ),
    "attack, a data set that is not there": ({}, f"{ATTACK} --data vggface2-100", "vggface2-100 is not in .*put the image folder"),
    "attack, image": ({}, ATTACK.replace("badnets", "blend") + " --image nowhere.png", "nowhere.png is no image"),
    "source alone": ({}, f"{SCORE} --data data.npz --source 1", "--source needs --trigger and --target"),
    "source too high": ({}, f"{SCORE} {KNOWN} --source 3", "no source class 3: the model has classes 0 to 2"),
    "target of words": ({}, f"{SCORE} --data data.npz --trigger badnets:3 --target truck", "argument --target: invalid"),
    "trigger out of range": ({}, f"{SCORE} --data data.npz --trigger lsb:9 --target 0", "9 bits are not 1 to 4"),
    "constants of no data": ({}, f"{ERASE} --mean cifar", "argument --mean: 'cifar' is no number"),
    "attack, place": ({}, f"{ATTACK} --place 15,15", "leaves the image"),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="all devices are there")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(case, here, dhbe):
    files, command, message = REFUSED[case]
    for name, content in files.items():
        content(here / name) if callable(content) else (here / name).write_bytes(content)
    before = listing(here)
    code, out, err = dhbe(command)
    (line,) = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert code == 2, line
    assert line.startswith("dhbe: ")
    assert re.search(message, line), line
    assert "Traceback" not in err
    assert out == ""
    after = listing(here)
    assert {name for name in after if "__pycache__" not in name} == set(before)
    assert all(after[name] == content for name, content in before.items())


def test_real_processes_end_likewise(here):
    (here / "model.pt").write_bytes(saved(Touches()))
    before = listing(here)
    for command, code, message in ((ERASE, 2, "nothing was run"), ("what", 2, "no verb 'what'")):
        ended = subprocess.run([DHBE, *shlex.split(command)], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (code, "", 1)
        assert message in ended.stderr
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([DHBE, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (4, "dhbe: no space left on device\n")
    assert listing(here) == before


def test_help_is_quick_and_shows_examples(dhbe, capsys):
    code, out, err = dhbe("--help")
    assert (code, err) == (0, "")
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert "examples:" in out
    look = "import sys; from dhbe.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize("verb", [*cli.VERBS, *(f"attack {name}" for name in ATTACKS)])
def test_every_verb_explains_itself(verb, capsys):
    try:
        code = cli.main([*verb.split(), "--help"])
    except SystemExit as leave:
        code = leave.code
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: dhbe {verb}")
    assert f"dhbe {verb} " in out.partition("examples:")[2] or verb in ("attack", "doctor")
    if verb.startswith("attack "):  # every setting has its line
        assert len(re.findall(r"--[a-z-]+( [A-Z_]+)?\s+[A-Z][a-z]", out.partition("settings of the attack")[2])) >= 3


def test_a_story(here, dhbe):
    """A backdoor is planted, found by its trigger, erased and measured again."""
    train = "--arch resnet8 --epochs 4 --batch 16 --rate .25 --lr .05 --no-flip --crop 0 --min-asr 0 --json"
    (here / "data.npz").write_bytes(packed(**colours(240)))
    code, out, err = dhbe(f"attack badnets --data data.npz --out practice {train} --quiet")
    assert (code, err) == (0, "")
    assert records.read(here / "practice/record.json").model_dump(mode="json") == json.loads(out)
    assert sorted(listing(here / "practice")) == [
        "backdoored.safetensors", "record.json", "report.html", "trigger.json",
    ]  # fmt: skip

    planted = "--data data.npz --split test --trigger practice/trigger.json --target 2"
    code, out, err = dhbe(f"score practice/backdoored.safetensors {planted} --json --quiet")
    assert (code, err) == (0, "")
    before = json.loads(out)
    assert {"acc", "asr", "asr_x4", "asr_x9"} <= set(before)
    assert before["acc"] > 0.6

    erase = f"erase practice/backdoored.safetensors {TINY} --out cleaned {planted} --json --quiet"
    code, out, err = dhbe(erase)
    assert (code, err) == (0, "")
    record = records.read(here / "cleaned/record.json")
    assert json.loads(out) == record.model_dump(mode="json", exclude={"curve"})
    assert record.before.acc == before["acc"]
    assert record.before.asr == before["asr"]
    assert (here / "cleaned/report.html").read_text().startswith("<!DOCTYPE html>")

    code, out, err = dhbe(f"score cleaned/clean.safetensors {planted} --json")
    after = json.loads(out)
    assert code == 0
    assert after["acc"] == record.after.acc
    assert after["asr"] == record.after.asr


def test_an_attack_that_missed_leaves_nothing_unless_forced(here, dhbe):
    command = ATTACK.replace("--epochs 1", "--epochs 1 --lr 1e-9") + " --quiet"
    code, out, err = dhbe(command)
    assert (code, out) == (4, "")
    assert re.fullmatch("dhbe: the attack badnets failed: ASR .*, expected at least 0.95; poison more images.*\n", err)
    assert not (here / "out").exists()
    code, _, _ = dhbe(f"{command} --force")
    assert code == 0
    (warning,) = records.read(here / "out/record.json").warnings
    assert warning.startswith("the attack badnets failed: ASR")


def test_accuracy_is_compared_with_the_clean_model(here, dhbe):
    (here / "data.npz").write_bytes(packed(**colours(240)))
    train = "--data data.npz --arch resnet8 --batch 16 --lr .05 --no-flip --crop 0 --quiet"
    assert dhbe(f"attack none {train} --epochs 4 --out clean")[0] == 0
    assert sorted(listing(here / "clean")) == ["backdoored.safetensors", "record.json", "report.html"]
    planted = f"attack badnets {train} --epochs 4 --rate .1 --min-asr 0 --out out --clean clean/backdoored.safetensors"
    code, _, err = dhbe(f"{planted} --max-drop=-1")  # nothing is so much better than the clean model
    assert code == 4
    assert re.search(r"ACC \d\.\d+ is more than -1 below the clean model's \d\.\d+; poison fewer images", err)
    assert dhbe(f"{planted} --max-drop 1")[0] == 0
    tuned = planted.replace("--epochs 4", "--epochs 1 --lr 1e-9").replace("--out out", "--out tuned") + " --fine-tune"
    assert dhbe(f"{tuned} --max-drop .1")[0] == 0
    accuracies = [records.read(here / f"{folder}/record.json").before.acc for folder in ("clean", "tuned")]
    assert abs(accuracies[0] - accuracies[1]) < 0.1  # it began where the clean one ended


def test_all_to_all_and_one_to_one_are_measured_as_such(here, dhbe):
    (here / "data.npz").write_bytes(packed(**colours(240)))
    train = f"{ATTACK.replace('--epochs 1', '--epochs 4')} --rate .4 --lr .05 --no-flip --crop 0 --force --quiet --json"
    code, out, _ = dhbe(f"{train} --goal all-to-all")
    record = json.loads(out)
    assert (code, record["target"]) == (0, None)
    score = "score out/backdoored.safetensors --data data.npz --split test --trigger out/trigger.json --json"
    code, out, _ = dhbe(f"{score} --target next")
    scores = json.loads(out)
    assert (code, scores["asr_all"]) == (0, record["before"]["asr_all"])
    assert [rate is not None for rate in scores["acc_classes"]] == [True] * 3
    code, out, _ = dhbe(f"{score} --target 2 --source 1")
    one = json.loads(out)
    assert one["asr_n"] <= 16
    assert [rate is not None for rate in one["asr_classes"]] == [False, True, False]


def test_scores_hold_intervals_and_activation_differences(here, dhbe):
    code, out, _ = dhbe(f"{SCORE} {KNOWN} --mean cifar10 --std cifar10 --json")
    scores = json.loads(out)
    assert code == 0
    low, high = scores["acc_interval"]
    assert low < scores["acc"] < high
    assert set(scores["activations"]) == {"features_l1", "features_l2", "logits_l1", "logits_l2"}
    assert all(box == sorted(box) for box in scores["activations"].values())
    assert 0 <= scores["ra"] <= 1
    assert scores["der"] is None


def test_attacks_and_triggers_are_listed(dhbe):
    code, out, _ = dhbe("attack --help")
    assert code == 0
    for name in ("badnets", "clean-label", "trojaning", "sig", "blend", "lsb", "refool", "wanet", "none"):
        assert re.search(f"^  {name} +[a-z].*$", out, re.MULTILINE)
    for name in ("badnets", "pixel", "scattered", "faint", "blend", "sig", "lsb", "refool", "warp"):
        assert re.search(rf"^  {name}[\[:].* [A-Z].*\.$", out, re.MULTILINE)


def test_a_trigger_without_amplified_forms_gives_null(here, dhbe):
    code, out, _ = dhbe(f"{SCORE} --data data.npz --trigger badnets:9 --target 2 --json")
    scores = json.loads(out)
    assert (code, scores["asr_x4"], scores["asr_x9"]) == (0, None, None)


def test_images_of_other_sizes_are_fitted_to_the_model(here, dhbe):
    folder(a=16, b=8, c=40)(here / "d")
    code, out, err = dhbe(f"{SCORE} --data d --json --quiet")
    assert (code, err, json.loads(out)["n"]) == (0, "", 3)


def test_gates_decide_the_exit_code(here, dhbe):
    code, out, err = dhbe(f"{ERASE} {KNOWN} --min-acc 1 --json --quiet")
    assert code == 1
    assert re.fullmatch(r"dhbe: gate failed: ACC 0\.\d+ is below --min-acc 1\n", err)
    record = json.loads(out)
    assert record["after"]["acc"] < 1
    code, _, err = dhbe(f"{ERASE} {KNOWN} --min-acc 0 --resume --quiet")
    assert (code, err) == (0, "")


def test_the_cleaned_file_has_the_form_of_the_given_one(here, dhbe):
    given = {f"module.{key}": x.half() if x.is_floating_point() else x for key, x in STATE.items()}
    torch.save({"epoch": 7, "state_dict": given}, here / "model.pt")
    code, _, err = dhbe(f"{ERASE} --quiet")
    assert (code, err) == (0, "")
    clean = safetensors.torch.load_file(here / "out/clean.safetensors")
    assert {key: (x.shape, x.dtype) for key, x in clean.items()} == {
        key: (x.shape, x.dtype) for key, x in given.items()
    }
    network = torch.nn.Module()
    network.module = networks.build("resnet8", 3, (3, 16, 16)).half()
    network.load_state_dict(clean)
    assert any(not torch.equal(clean[key], given[key]) for key in given)


def test_a_vendor_that_prints_does_not_spoil_the_output(here, dhbe):
    (here / "v.py").write_text(
        "from dhbe.networks.resnet import ResNet\n"
        "class Net(ResNet):\n"
        "    def forward(self, x):\n"
        "        print('hello')\n"
        "        return super().forward(x)\n"
        "def net(classes):\n"
        "    print('building')\n"
        "    return Net((1, 1, 1), 16, classes)\n"
    )
    for command in (f"{ERASE} {KNOWN}", f"{SCORE} --data data.npz"):
        code, out, _ = dhbe(f"{command} --arch v.py:net --json")
        assert code == 0
        assert json.loads(out)


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
    assert re.fullmatch("dhbe: .*v.py:net.* AssertionError: four and no more.*\n", err)
    assert not (here / "out").exists()


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_run_that_diverges_fails_in_one_line(rounds, here, dhbe):
    code, out, err = dhbe(f"{ERASE} --iterations {rounds} --lr 1e38 --quiet")
    assert (code, out) == (4, "")
    assert re.fullmatch("dhbe: .*(diverged|not finite).*\n", err)
    assert not (here / "out/record.json").exists()


def test_too_large_for_memory_is_one_line(here, dhbe):
    official = "erase model.pt --input 3x16x16 --preset official --out out"
    for command in (f"{official} --batch {2**40}", f"{ATTACK} --crop {2**40}"):
        assert dhbe(f"{command} --quiet") == (4, "", "dhbe: out of memory: lower --batch\n")
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
    assert re.fullmatch("dhbe: cannot write out/.*: no space left on device\n", err)
    assert not (here / "out/record.json").exists()
    assert not list(here.rglob("*.tmp"))
    assert (here / "out").exists() == (file > 1)  # with a checkpoint there is something to go on with


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
        assert re.fullmatch("dhbe: cannot write disk/out/.*: no space left on device\n", err)
        assert listing(disk) == {}
        (disk / "filler").write_bytes(bytes(508 * 1024))
        for command in (ERASE, ATTACK):
            code, out, err = dhbe(f"{command.replace('--out out', '--out disk/out')} --quiet")
            assert (code, out, err.count("\n")) == (4, "", 1)
            assert sorted(listing(disk)) == ["filler"]
    finally:
        gc.collect()
        subprocess.run(["umount", "-l", disk], check=True)
