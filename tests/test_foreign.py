"""Text that others wrote: nothing of it acts on a terminal or a page."""

import json
import os
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import ERASE, SCORE, TINY, colours, packed, saved, small_state
from hypothesis import given
from hypothesis import strategies as st

from dhbe import foreign, records

EVIL = "a\x1b[2J\x1b]0;owned\x07\r\n\x9b31m\u202e\u2066gpj\u2028.\x7f"
LONG = "n" * 240


@given(st.text() | st.binary().map(os.fsdecode))
def test_what_is_shown_prints_and_stays_what_it_was_where_it_printed(text):
    shown = foreign.harmless(text)
    assert shown.isprintable()
    shown.encode()
    assert shown == text or not text.isprintable()
    assert len(foreign.name(text)) <= foreign.LONGEST
    assert foreign.line(text).isprintable()


def test_nested_settings_are_cleaned_to_the_last_key():
    assert foreign.values({"a\n": [{"b\x1b": ("\u202e", 1, None)}]}) == {"a\\n": [{"b\\x1b": ["\\u202e", 1, None]}]}


def clean(*outputs):
    for output in outputs:
        assert all(line.isprintable() for line in output.split("\n")), ascii(output)


NAMED = {
    "a model that is not there": ({}, f"erase {shlex.quote(EVIL)}"),
    "a key": ({"model.pt": saved({EVIL: torch.tensor([torch.nan])})}, ERASE),
    "a global": ({"model.pt": b"\x80\x02c" + EVIL.replace("\n", "").encode() + b"\nx\n."}, ERASE),
    "a place": ({"model.pt": saved({EVIL: {"a": torch.ones(1)}, "b": {"a": torch.ones(1)}})}, ERASE),
    "an architecture": ({}, f"{ERASE} --arch {shlex.quote(EVIL)}"),
    "a vendor's code": ({}, f"{ERASE} --arch {shlex.quote(EVIL + '.py:net')}"),
    "a trigger": ({}, f"{SCORE} --data data.npz --target 0 --trigger {shlex.quote(EVIL)}"),
    "a trigger's file": ({}, f"{SCORE} --data data.npz --target 0 --trigger {shlex.quote(EVIL + '.json')}"),
    "a trigger's kind": (
        {"t.json": json.dumps({"kind": EVIL, "shape": [3, 16, 16]}).encode()},
        f"{SCORE} --data data.npz --target 0 --trigger t.json",
    ),
    "data": ({}, f"{SCORE} --data {shlex.quote(EVIL)}"),
    "an array": ({"d.npz": packed(**{EVIL: np.ones(1)})}, f"{SCORE} --data d.npz"),
    "a folder": ({}, f"erase model.pt --input 3x16x16 --out {shlex.quote('model.pt/' + EVIL)}"),
    "a device": ({}, f"{ERASE} --device {shlex.quote(EVIL)}"),
    "a verb": ({}, shlex.quote(EVIL)),
    "an option": ({}, f"{ERASE} {shlex.quote('--' + EVIL)}"),
}


@pytest.mark.parametrize("case", NAMED)
def test_names_that_others_chose_stay_text_in_messages(case, here, dhbe):
    files, command = NAMED[case]
    for name, content in files.items():
        (here / name).write_bytes(content)
    code, out, err = dhbe(command)
    assert (code, out) == (2, "")
    clean(err)


def test_a_long_name_is_shortened_in_messages(here, dhbe):
    for command in (
        f"erase {LONG}.pt",
        f"{SCORE} --data {LONG}",
        f"erase model.pt --input 3x16x16 --out model.pt/{LONG}",
    ):
        code, _, err = dhbe(command)
        assert code == 2
        assert LONG not in err
        assert "nnn...nnn" in err


def test_a_run_on_files_with_evil_names_shows_none_of_it(here, dhbe):
    model, data = EVIL.replace("/", "") + ".pt", EVIL.replace("/", "") + ".npz"
    (here / model).write_bytes(saved(small_state()))
    (here / data).write_bytes(packed(**colours()))
    quoted = shlex.quote(model)
    code, out, err = dhbe(f"erase {quoted} --input 3x16x16 {TINY} --data {shlex.quote(data)} --out {shlex.quote(EVIL)}")
    assert code == 0, err
    clean(out, err)
    (folder,) = [path for path in here.iterdir() if path.is_dir()]
    record = records.read(folder / "record.json")
    clean(record.model.path, record.data)
    page = (folder / "report.html").read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
