import errno
import hashlib
import os
import subprocess
import sys
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


@pytest.fixture
def strange(tmp_path):
    """What is no file that can be read, by what must be said of it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    with (tmp_path / "holes").open("wb") as file:
        file.write(b"{")
        file.truncate(2**34)
    return {
        "pipe": "not a regular file", "zero": "not a regular file", "loop": "symbolic links", "holes": "is sparse",
        ".": "a folder", "missing": "no such file", "nul\0": "impossible name",
    }  # fmt: skip


def test_only_regular_files_are_opened_and_nothing_is_waited_for(strange, tmp_path):
    for name, message in strange.items():
        with pytest.raises(Refused, match=message):
            files.opened(tmp_path / name)
        with pytest.raises(Refused, match=message):
            files.sha256(tmp_path / name)
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_bytes(b"content")
    with files.opened(tmp_path / "link", most=7) as file:
        assert file.read() == b"content"
    with pytest.raises(Refused, match="7 bytes, over the limit of 6"):
        files.opened(tmp_path / "file", most=6)


def test_a_lock_is_held_once_follows_no_link_and_goes_with_its_process(tmp_path):
    path, elsewhere = tmp_path / ".lock", tmp_path / "elsewhere"
    holding = (
        f"from dhbe import files; from pathlib import Path; held = files.held(Path({str(path)!r}));"
        "print(held.__enter__(), flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holding],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout.readline() == "True\n"
        with files.held(path) as ours:
            assert not ours
        other.kill()
    with files.held(path) as ours, files.held(path) as again:
        assert (ours, again) == (True, False)
    path.unlink()
    elsewhere.touch()
    path.symlink_to(elsewhere)
    with pytest.raises(OSError, match=str(path)), files.held(path):
        pass
