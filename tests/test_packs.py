"""Packs of arrays, honest and hostile."""

import contextlib
import io
import struct
import zipfile

import numpy as np
import pytest
import torch
from conftest import random_pixels

from dhbe.data import load, read_pack
from dhbe.data.packs import load_pack
from dhbe.errors import Refused


def save_pack(path, **changes):
    arrays = {"images": random_pixels(6, 4, 5, 3), "labels": np.array([0, 1, 2, 0, 1, 2])} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return arrays


def test_a_pack_is_read_as_numpy_reads_it(tmp_path):
    path = tmp_path / "data.npz"
    arrays = save_pack(path, images=np.asfortranarray(random_pixels(6, 4, 5, 3)), labels=np.arange(6, dtype=">i2"))
    images = load(str(path))
    assert np.array_equal(images.pixels.permute(0, 2, 3, 1), arrays["images"])
    assert images.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert images.names == ("0", "1", "2", "3", "4", "5")


def test_grey_and_compressed_packs(tmp_path):
    grey = random_pixels(10, 4, 5)
    np.savez_compressed(tmp_path / "grey.npz", images=grey, labels=np.repeat([0, 1], 5))
    images = load(str(tmp_path / "grey.npz"), "train")
    assert images.shape == (1, 4, 5)
    assert images.labels.bincount().tolist() == [4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "lacks images; it holds 'labels'"),
        ({"images": None, "labels": None, "x": np.zeros(1)}, "lacks images and labels; it holds 'x'"),
        ({"images": np.zeros((6, 4, 4, 3), np.float32)}, r"float32, not uint8.*\(255 \* images\)"),
        ({"images": np.zeros((6, 4, 4, 3), np.int64)}, "int64, not uint8"),
        ({"images": random_pixels(6, 48)}, r"must be \[n, h, w, c\]"),
        ({"images": random_pixels(6, 4, 32, 32)}, "1 or 3 channels"),
        ({"images": np.zeros((6, 4, 4, 3)) - 1}, "float64, not uint8.*before any normalisation"),
        ({"images": random_pixels(0, 4, 4, 3), "labels": np.zeros(0, int)}, r"not \[0, 4, 4, 3\]"),
        ({"labels": np.zeros(5, int)}, r"labels must be integers \[6\].*\[5\]"),
        ({"labels": np.full((6, 2), 2)}, r"not int64 \[6, 2\]"),
        ({"labels": np.eye(2)[[0, 1, 0]].repeat(2, 1)}, "labels must name one class per image"),
        ({"labels": np.full(6, 0.5)}, "labels must be integers"),
        ({"labels": np.full(6, np.nan)}, "labels must be integers"),
        ({"labels": np.array([0, 1, -1, 0, 1, 2])}, "go from -1 to 2"),
        ({"labels": np.array([0, 1, 2**40, 0, 1, 2])}, "must be class numbers"),
        ({"labels": np.array([0, 1, 2**64 - 1, 0, 1, 2], np.uint64)}, "must be class numbers"),
        ({"images": np.array([{}], dtype=object)}, "holds Python objects"),
    ],
)
def test_packs_that_are_not_as_described_are_refused(tmp_path, changes, message):
    path = tmp_path / "data.npz"
    save_pack(path, **changes)
    with pytest.raises(Refused, match=message) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_no_pickle_in_a_pack_is_executed(tmp_path):
    save_pack(tmp_path / "data.npz", labels=np.array([Bomb()] * 6, dtype=object))
    with pytest.raises(Refused, match="could run code"):
        load(str(tmp_path / "data.npz"))


def pack_of(path, header: bytes, body: bytes = b"", version: tuple[int, int] = (1, 0)):
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", b"\x93NUMPY" + bytes(version) + length + header + body)
        labels = io.BytesIO()
        np.save(labels, np.zeros(6, int))
        archive.writestr("labels.npy", labels.getvalue())


@pytest.mark.parametrize(
    ("shape", "body", "version", "message"),
    [
        ("(200000, 224, 224, 3)", b"", (1, 0), "over the limit of 0.25 GiB"),
        (f"({10**18}, 224, 224, 3)", b"", (1, 0), "over the limit of 0.25 GiB"),
        ("(-6, 4, 4, 3)", b"", (1, 0), "over the limit"),
        ("(6, 4, 4, 3)", b"\0" * 100, (1, 0), "does not hold"),
        ("(6, 4, 4, 3)", b"\0" * 1000, (1, 0), "does not hold"),
        ("(6, 4, 4, 3)", b"\0" * 288, (2, 0), "not a plain array"),
        ("__import__('os')", b"", (1, 0), "not a complete"),
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_allocated(tmp_path, shape, body, version, message):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}"
    pack_of(tmp_path / "data.npz", header.encode(), body, version)
    with pytest.raises(Refused, match=message):
        load(str(tmp_path / "data.npz"))


def test_the_limit_counts_all_arrays(tmp_path):
    arrays = save_pack(tmp_path / "data.npz")
    size = sum(array.nbytes for array in arrays.values())
    assert len(read_pack(tmp_path / "data.npz", tuple(arrays), limit=size)) == 2
    with pytest.raises(Refused, match="over the limit"):
        read_pack(tmp_path / "data.npz", tuple(arrays), limit=size - 1)


@pytest.mark.parametrize(
    "header", [b"(", b"{'descr': '|u1', 'shape': (4, 4", b"  x\n y", b"{{}: 1}", b"01", b"[" * 5000]
)
def test_headers_that_are_no_python_are_refused(tmp_path, header):
    pack_of(tmp_path / "data.npz", header)
    with pytest.raises(Refused, match="not a complete") as caught:
        load(str(tmp_path / "data.npz"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_compression_of_any_kind_is_refused(tmp_path, method):
    array = io.BytesIO()
    np.save(array, random_pixels(2, 3, 3, 3))
    with zipfile.ZipFile(tmp_path / "data.npz", "w", method) as archive:
        for name in ("images.npy", "labels.npy"):
            archive.writestr(name, array.getvalue())
    whole = (tmp_path / "data.npz").read_bytes()
    for place in range(0, len(whole) // 2):
        (tmp_path / "data.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(Refused):  # at the latest because the labels are images
            load_pack(tmp_path / "data.npz")


def test_damage_anywhere_in_a_pack_is_refused_or_harmless(tmp_path):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, images=random_pixels(2, 3, 3, 3), labels=np.array([0, 1]))
    whole = path.read_bytes()
    expected = load_pack(path).pixels
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(Refused):
            load_pack(path)
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with contextlib.suppress(Refused):
            assert torch.equal(load_pack(path).pixels, expected)  # the sum holds: a byte that nobody reads
