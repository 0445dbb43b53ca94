"""What cannot be used: one line, exit code 2, and the folder as it was."""

import json
import os
import pickle
import re
import shlex
import struct
import subprocess
import sys
import zipfile
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ATTACK, ERASE, KNOWN, SCORE, TINY, colours, folder, image, listing, packed, saved, small_state

from dhbe import networks, state_file
from dhbe.cli import main

DHBE = Path(sys.executable).with_name("dhbe")


class Touches:
    """A pickle of it leaves a file behind if it is opened carelessly."""

    def __reduce__(self):
        return os.system, ("touch canary",)


def text_among_images(path):
    folder(a=16, b=16, c=16)(path)
    (path / "a" / "readme.doc").write_text("not an image")


def finished(path):
    path.mkdir()
    (path / "record.json").write_text("{}")


def interrupted(path, settings='{"seed": 1}'):
    (path / "checkpoint").mkdir(parents=True)
    state_file.write(path / "checkpoint" / "state.pt", settings, {})


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
    "picture": ({"model.pt": b"\x89PNG\r\n\x1a\n"}, ERASE, "broken, truncated or not a checkpoint"),
    "nan": ({"model.pt": saved(BROKEN)}, ERASE, "NaN or infinite weights in fc.bias"),
    # What it is taken for
    "wrong architecture": ({}, f"{ERASE} --arch wrn16-1", "does not fit the network.*check --arch"),
    "unknown architecture": ({}, f"{ERASE} --arch resnet9000", r"unknown architecture 'resnet9000' .did you mean resnet20\?.: give one of"),
    "untold architecture": ({"model.pt": saved({"w": torch.ones(3, 3)})}, ERASE, "add --arch"),
    "wrong classes": ({}, f"{ERASE} --classes 4", r"wrong shape: fc.weight \[3, 64\] for \[4, 64\]"),
    "one class": ({}, f"{ERASE} --classes 1", "1 is not between 2 and 100,000"),
    "function needs more": (
        {"v.py": b"def net(depth, classes, *more, width=1, **rest):\n    raise AssertionError\n"}, f"{ERASE} --arch v.py:net",
        r"^dhbe: v.py:net requires depth, .*net = functools\.partial\(net, depth=\.\.\.\), and give --arch=FILE\.py:net$",
    ),
    "no vendor file": ({}, f"{ERASE} --arch vendor.py:net", "vendor.py, which is not a file"),
    "no vendor module": ({}, f"{ERASE} --arch vendor.models:net", "vendor.models:net fails: ModuleNotFoundError"),
    "no such function": ({"v.py": RAISES}, f"{ERASE} --arch v.py:other", "no function 'other'; it has net"),
    "function raises": ({"v.py": RAISES}, f"{ERASE} --arch v.py:net", "v.py:net fails: RuntimeError: no network today"),
    "vendor exits": ({"v.py": EXITS}, f"{ERASE} --arch v.py:net", "v.py:net fails: SystemExit"),
    "not code": ({"v.py": b"\x00\xff"}, f"{ERASE} --arch v.py:net", "v.py:net fails: "),
    "another's network": ({"v.py": NARROW}, f"{ERASE} --arch v.py:net", "does not fit the network"),
    "channels": ({}, f"erase model.pt --input 2x32x32 {TINY}", "does not fit the network|1 or 3 channels"),
    "no pixels": ({}, "erase model.pt --input 3x0x32", "'3x0x32' is not a shape"),
    "too small": ({}, "erase model.pt --input 3x7x7", "--input=3x7x7: generated images must be square, of 8 px or more"),
    "no shape": ({}, "erase model.pt --input abc", "'abc' is not a shape CHANNELSxHEIGHTxWIDTH"),
    "not square": ({}, "erase model.pt --input 3x32x16", "generated images must be square"),
    "two means": ({}, f"{ERASE} --mean .4 .5", "--mean has 2 values, the images have 3 channels"),
    "mean of words": ({}, f"{ERASE} --mean red", "--mean=red: give numbers, or one of imagenet"),
    "mean of nothing": ({}, f"{ERASE} --mean nan", "--mean=nan: give numbers"),
    "std 0": ({}, f"{ERASE} --std 0", "--std must be positive, not 0"),
    "std infinite": ({}, f"{ERASE} --std inf", "--std=inf: give numbers"),
    "std of almost nothing": ({}, f"{ERASE} --std 1e-60", "--std 1e-60: no normalisation of pixels in"),
    # Data
    "no such data": ({}, f"{SCORE} --data nowhere", "no data called 'nowhere'"),
    "no data": ({}, SCORE, "required: --data"),
    "text among images": ({"d": text_among_images}, f"{SCORE} --data d", "readme.doc is not a readable image"),
    "empty classes": ({"d": folder(a=0, b=0, c=0)}, f"{SCORE} --data d", "class folders of d are empty"),
    "missing class": ({"d": folder(a=16, b=16)}, f"{SCORE} --data d", "2 class folders .a, b., .* 3 classes: give --class-names"),
    "too many classes": ({"d": folder(**{str(n): 16 for n in range(4)})}, f"{SCORE} --data d", "labels up to 3, the model has 3"),
    "classes of other names": (
        {"d": folder(a=16, b=16), "n": b"a\nc\nd\n"}, f"{SCORE} --data d --class-names n", "folder b is not one of the classes .a, c, d",
    ),
    "class names twice": ({"n": b"a\na\n"}, f"{SCORE} --data data.npz --class-names n", "n must list all classes, each once"),
    "no class names": ({}, f"{SCORE} --data data.npz --class-names nowhere", "cannot read the class names in nowhere"),
    "mean of bytes": ({}, f"{ERASE} --mean 125 --std 63", "units of 0..255.*: give --mean 0.4902 --std 0.2471"),
    "file beside the classes": ({"d": folder(a=16), "d/x.png": image()}, f"{SCORE} --data d", "lies beside the class"),
    "mixed sizes": ({"d": folder(a=16, b=8, c=9)}, ATTACK + " --data d", "mixed sizes: .* resize, or give --input"),
    "objects": (
        {"d.npz": packed(images=np.array([Touches()], object), labels=DATA["labels"])}, f"{SCORE} --data d.npz",
        "images holds Python objects, which could run code",
    ),
    "no npz": ({"d.npz": b"PK\x03\x04"}, f"{SCORE} --data d.npz", "not a complete .npz"),
    "npz of floats": (
        {"d.npz": packed(images=DATA["images"] / 255, labels=DATA["labels"])}, f"{SCORE} --data d.npz", "not uint8",
    ),
    "npz of another size": ({"d.npz": packed(**colours(side=8))}, f"{SCORE} --data d.npz", "images are 3x8x8, the clas"),
    "labels out of range": (
        {"d.npz": packed(**colours(classes=4))}, f"{SCORE} --data d.npz", "labels up to 3, the model has 3 classes",
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
    "trigger file": ({"t.json": b"[[["}, f"{SCORE} --data data.npz --trigger t.json --target 0", "not a trigger written by dhbe"),
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
    "finished run": ({"out": finished}, ERASE, "out holds a finished run: add --overwrite to start over, or"),
    "broken record": ({"out": finished}, f"{ERASE} --resume", "out/record.json is not a record of dhbe"),
    "interrupted run": ({"out": interrupted}, ERASE, "holds an interrupted run: add --resume to resume it"),
    "other settings": ({"out": interrupted}, f"{ERASE} --resume", "holds a run with other settings"),
    "broken checkpoint": ({"out": broken_checkpoint}, f"{ERASE} --resume", "cannot resume from .*: add --overwrite"),
    "resume and overwrite": ({}, f"{ERASE} --resume --overwrite", "not allowed with"),
    "onto itself": (
        {"out": lambda path: path.mkdir(), "out/clean.safetensors": safetensors.torch.save(STATE)},
        f"erase out/clean.safetensors --input 3x16x16 {TINY} --out out --overwrite", "is read by this run and would be replaced",
    ),
    "attack onto a run": ({"out": finished}, ATTACK, "holds a finished run"),
    "attack into a file": ({"out": b""}, ATTACK, "cannot write into out"),
    # Options
    "unknown verb": ({}, "erradicate model.pt", "no verb 'erradicate'; available: erase, scan, verify, "),
    "unknown option": ({}, f"{ERASE} --frobnicate", "unrecognized arguments: --frobnicate"),
    "abbreviated option": ({}, f"{ERASE} --iter 3", "unrecognized arguments: --iter"),
    "unknown preset": ({}, f"{ERASE} --preset best", "invalid choice: 'best'"),
    "no model": ({}, "erase", "required: MODEL"),
    "batch 0": ({}, f"{ERASE} --batch 0", "--batch 0: it must be a number of at least 4"),
    "batch beyond all": ({}, f"{ERASE} --batch {10**30}", "argument --batch: 10+ is not between"),
    "pool beyond all": ({}, f"{ERASE} --pool-size {10**30}", "argument --pool-size: 10+ is not between"),
    "batch of words": ({}, f"{ERASE} --batch many", "argument --batch: 'many' is not a whole number"),
    "patch 40": ({}, f"{ERASE} --patch 40", "--patch 40: a trigger must have 1 to 16 px"),
    "lr of nothing": ({}, f"{ERASE} --lr nan", "argument --lr: nan is not between"),
    "seed -1": ({}, f"{ERASE} --seed -1", "-1 is not between 0 and"),
    "seed of words": ({}, f"{ERASE} --seed x", "argument --seed: 'x' is not a whole number"),
    "checkpoint never": ({}, f"{ERASE} --checkpoint-every nan", "argument --checkpoint-every"),
    "no such device": ({}, f"{ERASE} --device cuda:7", "no device 'cuda:7' here"),
    "device of words": ({}, f"{ERASE} --device toaster", "no device 'toaster' here"),
    "device without memory": ({}, f"{ERASE} --device meta", "no device 'meta' here"),
    "unknown attack": ({}, "attack wannet", r"no attack 'wannet' \(did you mean wanet\?\); available: badnets"),
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
    "attack, nothing to tune": ({}, f"{ATTACK} --fine-tune", "--fine-tune needs a clean model: give --clean"),
    "attack, no clean model": ({}, f"{ATTACK} --clean nowhere.pt", "cannot read nowhere.pt"),
    "attack, another clean model": ({}, f"{ATTACK} --clean model.pt --arch wrn16-1", "clean model is a resnet8 with 3 .*must agree"),
    "attack, too few of a class": (
        {}, ATTACK.replace("badnets", "clean-label") + " --rate .9", "asks for 43 of 48 images, of which 16 lie in the target",
    ),
    "attack, a data set that is not there": ({}, f"{ATTACK} --data vggface2-100", "vggface2-100 is not in .*put the image folder"),
    "attack, image": ({}, ATTACK.replace("badnets", "blend") + " --image nowhere.png", "nowhere.png is not an image"),
    "source alone": ({}, f"{SCORE} --data data.npz --source 1", "--source needs --trigger and --target"),
    "source too high": ({}, f"{SCORE} {KNOWN} --source 3", "no source class 3: the model has classes 0 to 2"),
    "target of words": ({}, f"{SCORE} --data data.npz --trigger badnets:3 --target truck", "argument --target: invalid"),
    "trigger out of range": ({}, f"{SCORE} --data data.npz --trigger lsb:9 --target 0", "number of bits must be 1 to 4, not 9"),
    "constants of no data": ({}, f"{ERASE} --mean cifar", "--mean=cifar: give numbers, or one of .*cifar10"),
    "attack, place": ({}, f"{ATTACK} --place 15,15", "leaves the image"),
}  # fmt: skip


@cache
def options(verb):
    """What a verb's help offers."""
    with redirect_stdout(StringIO()) as said:
        main([*verb.split(), "--help"])
    return set(re.findall(r"--[a-z-]+", said.getvalue()))


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
    verb = " ".join(command.split()[: 2 if command.split()[0] in ("attack", "defend", "bench") else 1])
    named = set(re.findall(r"(?<![\w-])--[a-z-]+", line)) - set(command.split())
    assert named <= {"--help"} or named <= options(verb)
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
