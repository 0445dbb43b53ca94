import errno
import hashlib
import os
from pathlib import Path

import pytest

from dhbe import files
from dhbe.errors import Failed, Refused


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "record.json"
    files.write(path, "Grüße\n")
    assert path.read_bytes() == "Grüße\n".encode()
    files.write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_the_mode_is_that_of_any_new_file(tmp_path):
    previous = os.umask(0o027)
    try:
        files.write(tmp_path / "file", b"")
    finally:
        os.umask(previous)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "link").symlink_to("precious")
    files.write(tmp_path / "link", "new")
    assert (tmp_path / "precious").read_text() == "kept"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_broken_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, raised):
    path = tmp_path / "record.json"
    path.write_text("old")

    def fail(*_):
        raise raised

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], fail)
    with pytest.raises((Failed, KeyboardInterrupt)) as caught:
        files.write(path, "new")
    if isinstance(raised, OSError):
        assert str(caught.value) == f"cannot write {path}: no space left on device"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_impossible_places_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    places = {"file/record.json": "not a directory", "missing/record.json": "no such file", "folder": "is a directory"}
    for place, reason in places.items():
        with pytest.raises(Failed, match=reason):
            files.write(tmp_path / place, "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 1000)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(b"abc" * 1000).hexdigest()
    for unreadable in (tmp_path / "missing", tmp_path):
        with pytest.raises(Refused, match="cannot read"):
            files.sha256(unreadable)
