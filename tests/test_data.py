"""Images, data by name, and downloads."""

import io
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_pixels
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dhbe.data import Images, cifar, load, local, to_uint8
from dhbe.errors import Failed, Refused
from dhbe.files import sha256

# Images


def test_uint8_survives_the_way_through_floats():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    pixels = Images(every, torch.zeros(1, dtype=torch.int64), ("a",)).float()
    assert pixels.min() == 0
    assert pixels.max() == 1
    assert torch.equal(to_uint8(pixels), every)


@given(st.integers(0, 9), st.integers(1, 12))
def test_batches_are_the_images_in_order(n, size):
    images = Images(torch.randint(256, (n, 3, 2, 2), dtype=torch.uint8), torch.arange(n), tuple("abcdefghi"))
    batches = list(images.batches(size))
    assert [len(y) for _, y in batches] == [size] * (n // size) + [n % size] * (n % size > 0)
    if n:
        assert torch.equal(torch.cat([p for p, _ in batches]), images.float())
        assert torch.equal(torch.cat([y for _, y in batches]), images.labels)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), "must be uint8"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), "one per image"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2), "must be int64"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.tensor([0, 2]), "from 0 to 2; 2 classes"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.tensor([-1, 1]), "from -1 to 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(pixels, labels, message):
    with pytest.raises(Refused, match=message):
        Images(pixels, labels, ("a", "b"))


# Digits, splits, names


def test_digits_agree_with_pillows_way_of_enlarging():
    from sklearn.datasets import load_digits

    images = load("digits16")
    assert images.shape == (3, 16, 16)
    shades = load_digits().images
    for number in (0, 700, 1796):
        small = Image.fromarray((shades[number] / 16).astype(np.float32))
        enlarged = np.asarray(small.resize((16, 16), Image.Resampling.BILINEAR)) * 255
        for channel in images.pixels[number]:
            assert np.abs(channel.numpy() - enlarged).max() <= 0.5001


@pytest.mark.parametrize("name", ["digits", "digits16"])
def test_splits_part_the_data_class_by_class(name):
    whole, train, test = load(name), load(name, "train"), load(name, "test")
    assert len(train) + len(test) == len(whole) == 1797
    for label, count in enumerate(whole.labels.bincount()):
        assert (test.labels == label).sum() == count // 5
    rows = {image.numpy().tobytes() for image in whole.pixels}
    parts = [{image.numpy().tobytes() for image in part.pixels} for part in (train, test)]
    assert parts[0] | parts[1] == rows
    assert torch.equal(load(name, "test").pixels, test.pixels)


def test_unknown_data_is_refused_with_what_exists(tmp_path):
    for name in ("digit", str(tmp_path / "missing"), "data.zip"):
        with pytest.raises(
            Refused, match="digits16, cifar10, cifar100, fashion-mnist, an image folder, or an"
        ) as caught:
            load(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(Refused, match="file name too long"):
        load("x" * 5000)
    with pytest.raises(Refused, match="no such file"):
        load(str(tmp_path / "missing.npz"))
    with pytest.raises(Refused, match="3x32x32, the classifier takes 1x28x28"):
        load("digits", input_shape=(1, 28, 28))
    with pytest.raises(Refused, match="no split 'validation'; available: train, test, all"):
        load("digits16", "validation")  # pyright: ignore[reportArgumentType]


# CIFAR


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive in CIFAR-100's form, and the records in it."""
    records = {"train.bin": random_pixels(4, 3074), "test.bin": random_pixels(2, 3074)}
    for part in records.values():
        part[:, :2] %= 3
    with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz") as tar:
        for name, content in {**records, "fine_label_names.txt": np.frombuffer(b"ant\nbee\ncat\n", np.uint8)}.items():
            info = tarfile.TarInfo(f"cifar-100-binary/{name}")
            info.size = content.nbytes
            tar.addfile(info, io.BytesIO(content.tobytes()))
    monkeypatch.setenv("DHBE_DATA", str(tmp_path))
    return records


def test_cifar_is_read_from_its_bytes(archive, tmp_path, monkeypatch):
    with pytest.raises(Refused, match="not the file that"):
        load("cifar100")
    path = tmp_path / "cifar-100-binary.tar.gz"
    changed = replace(cifar.ARCHIVES["cifar100"], sha256=sha256(path))
    monkeypatch.setitem(cifar.ARCHIVES, "cifar100", changed)
    images = load("cifar100", "test")
    assert images.names == ("ant", "bee", "cat")
    assert images.labels.tolist() == archive["test.bin"][:, 1].tolist()
    red = archive["test.bin"][1, 2 : 2 + 1024].reshape(32, 32)
    assert np.array_equal(images.pixels[1, 0], red)
    assert len(load("cifar100")) == 6


def test_a_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DHBE_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(cifar, "SOURCE", "http://127.0.0.1:1/")
    with pytest.raises(
        Failed, match=r"cannot download http.*cifar-10-binary.tar.gz: no connection; download it yourself into"
    ) as said:
        load("cifar10")
    assert "\n" not in str(said.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_data_is_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("DHBE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    if sys.platform == "linux":
        assert local.kept() == tmp_path / "dhbe"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert local.kept() == tmp_path / ".cache" / "dhbe"
    monkeypatch.setenv("DHBE_DATA", str(tmp_path / "mine"))
    assert local.kept() == tmp_path / "mine"
