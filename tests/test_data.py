import contextlib
import io
import struct
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dhbe.data import Images, cifar, download, load, read_pack, to_uint8
from dhbe.data.folders import load_folder
from dhbe.data.packs import load_pack
from dhbe.errors import Failed, Refused
from dhbe.files import sha256

GENERATOR = np.random.default_rng(0)


def random_pixels(*shape: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, shape, dtype=np.uint8)


def save_pack(path, **changes):
    arrays = {"images": random_pixels(6, 4, 5, 3), "labels": np.array([0, 1, 2, 0, 1, 2])} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return arrays


@pytest.fixture
def folder(tmp_path):
    """Two classes, three RGB images of 5 x 4 each."""
    root = tmp_path / "images"
    for name in ("cat", "ant"):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(random_pixels(4, 5, 3)).save(root / name / f"{number}.png")
    return root


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
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), "one an image"),
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
        load("digits", shape=(1, 28, 28))
    with pytest.raises(Refused, match="no split 'validation'; there are train, test, all"):
        load("digits16", "validation")  # pyright: ignore[reportArgumentType]


# .npz files


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
        ({"images": random_pixels(6, 3, 32, 32)}, "1 or 3 channels"),
        ({"images": random_pixels(0, 4, 4, 3), "labels": np.zeros(0, int)}, r"not \[0, 4, 4, 3\]"),
        ({"labels": np.zeros(5, int)}, r"labels must be integers \[6\].*\[5\]"),
        ({"labels": np.zeros((6, 1), int)}, r"not int64 \[6, 1\]"),
        ({"labels": np.zeros(6)}, "labels must be integers"),
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
        ("(200000, 224, 224, 3)", b"", (1, 0), "over the limit of 4 GiB"),
        (f"({10**18}, 224, 224, 3)", b"", (1, 0), "over the limit of 4 GiB"),
        ("(-6, 4, 4, 3)", b"", (1, 0), "over the limit"),
        ("(6, 4, 4, 3)", b"\0" * 100, (1, 0), "does not hold"),
        ("(6, 4, 4, 3)", b"\0" * 1000, (1, 0), "does not hold"),
        ("(6, 4, 4, 3)", b"\0" * 288, (2, 0), "no plain array"),
        ("__import__('os')", b"", (1, 0), "not a whole"),
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
    with pytest.raises(Refused, match="not a whole") as caught:
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


# Image folders


def test_a_folder_is_read_by_sorted_names(folder):
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "ant" / "Thumbs.db").write_bytes(b"x")
    (folder / "cat" / ".hidden").write_bytes(b"x")
    images = load(str(folder))
    assert images.names == ("ant", "cat")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(images.pixels[4].permute(1, 2, 0), np.asarray(Image.open(folder / "cat" / "1.png")))


def test_grey_folders_stay_grey_unless_one_image_is_not(folder):
    for path in folder.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    grey = load(str(folder))
    assert grey.shape == (1, 4, 5)
    assert torch.equal(load(str(folder), shape=(3, 4, 5)).pixels, grey.pixels.repeat(1, 3, 1, 1))
    Image.fromarray(random_pixels(4, 5, 3)).save(folder / "ant" / "new.png")
    assert load(str(folder)).shape == (3, 4, 5)


def test_mixed_sizes_need_a_shape(folder):
    Image.new("RGBA", (9, 7), (10, 20, 30, 0)).save(folder / "cat" / "big.png")
    with pytest.raises(Refused, match=r"mixed sizes: .*0.png is 5 x 4, .*big.png 9 x 7: resize, or give --input"):
        load(str(folder))
    images = load(str(folder), shape=(3, 8, 6))
    assert images.shape == (3, 8, 6)
    assert (images.pixels[-1] == torch.tensor([10, 20, 30]).view(3, 1, 1)).all()


def test_folders_with_their_own_splits(folder, tmp_path):
    root = tmp_path / "split"
    root.mkdir()
    folder.rename(root / "train")
    (root / "val" / "cat").mkdir(parents=True)
    (root / "val" / "ant").mkdir()
    for name in ("ant", "cat"):
        Image.fromarray(random_pixels(4, 5, 3)).save(root / "val" / name / "x.png")
    assert [len(load(str(root), split)) for split in ("train", "test", "all")] == [6, 2, 8]
    (root / "val" / "ant" / "x.png").unlink()
    (root / "val" / "ant").rmdir()
    for split in ("train", "test", "all"):  # cat would be class 1 in one part and 0 in the other
        with pytest.raises(Refused, match="differ in their classes"):
            load(str(root), split)


def spoil(folder, what):
    place = folder / "cat" / "1.png"
    match what:
        case "text":
            (folder / "cat" / "notes.txt").write_text("hello")
        case "stray":
            (folder / "README").write_text("hello")
        case "nested":
            (folder / "cat" / "kitten").mkdir()
        case "empty class":
            (folder / "dog").mkdir()
            (folder / "dog" / ".DS_Store").write_bytes(b"")
        case "truncated":
            place.write_bytes(place.read_bytes()[:-40])
        case "empty file":
            place.write_bytes(b"")
        case "16 bits":
            Image.fromarray(np.full((4, 5), 60000, np.uint16)).save(place)
        case "postscript":
            place.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 4\n%%EndComments\n")
        case "bomb":  # a header that declares 60,000 x 60,000 pixels, and its checksum
            data = bytearray(place.read_bytes())
            data[16:24] = struct.pack(">II", 60000, 60000)
            data[29:33] = struct.pack(">I", __import__("zlib").crc32(data[12:29]))
            place.write_bytes(data)


@pytest.mark.parametrize("shape", [None, (3, 4, 5)])
@pytest.mark.parametrize(
    ("what", "message"),
    {
        "text": "notes.txt is no image",
        "stray": "README lies beside the class folders",
        "nested": "kitten is no image",
        "empty class": "dog is empty",
        "truncated": "1.png is broken",
        "empty file": "1.png is no image",
        "16 bits": "1.png has more than 8 bits",
        "postscript": "1.png is no image",
        "bomb": "1.png declares more than 89478485 pixels",
    }.items(),
)
def test_broken_folders_are_refused_by_name(folder, what, message, shape):
    spoil(folder, what)
    with pytest.raises(Refused, match=message) as caught:
        load(str(folder), shape=shape)
    assert "\n" not in str(caught.value)


def test_folders_too_small_or_too_large_are_refused(folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(Refused, match="holds no classes"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(Refused, match="no class has 5 images"):
        load(str(folder), "test")
    with pytest.raises(Refused, match="over the limit"):
        load_folder(folder, limit=6 * 60 - 1)
    assert len(load_folder(folder, limit=6 * 60)) == 6


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
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("DHBE_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(download.urllib.request, "urlopen", fail)
    with pytest.raises(Failed, match=r"cannot download https.*cifar-10-binary.tar.gz: no network; put the file into"):
        load("cifar10")
    assert list((tmp_path / "cache").iterdir()) == []
