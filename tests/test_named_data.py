"""Data sets that lie on this machine under a name, encoded packs, and what is known of them."""

import gzip
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dhbe.data import KNOWN, Images, clean_subset, idx, load, part_to_measure
from dhbe.errors import Failed, Refused

SHARED = Path(os.environ.get("DHBE_SHARED", Path(__file__).parents[2] / "shared")) / "data"
RANDOM = np.random.default_rng(0)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DHBE_DATA", str(tmp_path))
    return tmp_path


def encoded(images, kind="PNG", **more):
    """An .npz of encoded images, as keyword arguments of `np.savez`."""
    files = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, kind, **more)
        files.append(stream.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    return {"data": np.frombuffer(b"".join(files), np.uint8), "offsets": offsets}


def some(count=10, side=32):
    return RANDOM.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def planes(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_encoded_images_are_read_as_they_were(tmp_path):
    images, labels = some(), np.arange(10) % 3
    np.savez(tmp_path / "a.npz", labels=labels, names=np.array(["ant", "bee", "cat", "dog"]), **encoded(images))
    found = load(str(tmp_path / "a.npz"))
    assert torch.equal(found.pixels, planes(images))
    assert found.labels.tolist() == labels.tolist()
    assert found.names == ("ant", "bee", "cat", "dog")
    small = load(str(tmp_path / "a.npz"), input_shape=(1, 16, 16))
    expected = Image.fromarray(images[3]).convert("L").resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(small.pixels[3, 0].numpy(), np.asarray(expected))


def test_strips_hold_square_images_one_below_the_other(tmp_path):
    images = some(7, 8)
    strips = [images[:4].reshape(32, 8, 3), images[4:].reshape(24, 8, 3)]
    pack = encoded(strips, "WEBP", lossless=True)
    np.savez(tmp_path / "a.npz", labels=np.zeros(7, np.int16), strip=np.array(4), **pack)
    found = load(str(tmp_path / "a.npz"))
    assert torch.equal(found.pixels, planes(images))
    assert found.names == ("0",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": np.array([0, 5, 3])}, "offsets must rise from 0"),
        ({"offsets": np.array([0, 10**9])}, "offsets must rise from 0 to at most"),
        ({"offsets": np.array([0])}, "offsets must rise"),
        ({"offsets": np.array([0.0, 5.0])}, "offsets integers"),
        ({"offsets": np.array([0, 5])}, "a.npz: image file 0 is not a readable image"),
        ({"data": np.zeros(3)}, "data must be uint8"),
        ({"labels": np.zeros(3, int)}, r"labels must be integers \[2\]"),
        ({"labels": np.array([0, -1])}, "labels go from -1 to 0"),
        ({"names": np.array([1, 2])}, "names must be texts, one per class"),
        ({"names": np.array(["one"])}, "names must be texts, one per class, for the labels up to 1"),
        ({"names": np.array([["a", "b"]])}, "names must be texts"),
        ({"strip": np.array(2)}, "image file 0 is 8 x 9: a strip holds square images"),
    ],
)
def test_broken_encoded_packs_are_refused(changes, message, tmp_path):
    images = RANDOM.integers(0, 256, (2, 9, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", **{"labels": np.arange(2), **encoded(images), **changes})
    with pytest.raises(Refused, match=message) as caught:
        load(str(tmp_path / "a.npz"))
    assert "\n" not in str(caught.value)


def test_encoded_images_of_mixed_sizes_need_a_shape(tmp_path):
    np.savez(tmp_path / "a.npz", labels=np.arange(2), **encoded([some(1)[0], some(1, 16)[0]]))
    with pytest.raises(Refused, match="mixed sizes"):
        load(str(tmp_path / "a.npz"))
    assert load(str(tmp_path / "a.npz"), input_shape=(3, 8, 8)).shape == (3, 8, 8)


def test_parts_of_a_named_data_set_are_put_together(kept):
    images, labels = some(12), np.arange(12) % 10
    np.savez(kept / "cifar10_train_a.npz", images=images[:5], labels=labels[:5])
    np.savez(
        kept / "cifar10_train_b.npz", labels=labels[5:10], names=np.array(list("abcdefghij")), **encoded(images[5:10])
    )
    np.savez(kept / "cifar10_test.npz", images=images[10:], labels=labels[10:])
    train, test, whole = (load("cifar10", split) for split in ("train", "test", "all"))
    assert torch.equal(train.pixels, planes(images[:10]))
    assert torch.equal(test.pixels, planes(images[10:]))
    assert (len(whole), train.names) == (12, tuple("abcdefghij"))
    assert part_to_measure("cifar10") == "test"


def test_a_named_folder_gets_its_size_and_its_middle(kept):
    photo = RANDOM.integers(0, 256, (250, 250, 3), dtype=np.uint8)
    for person in ("ann", "bob"):
        (kept / "lfw100" / person).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(photo).save(kept / "lfw100" / person / f"{number}.png")
    faces = load("lfw-100", "train")
    assert (faces.shape, len(faces), faces.names) == ((3, 64, 64), 8, ("ann", "bob"))
    middle = Image.fromarray(photo[63:187, 63:187]).resize((64, 64), Image.Resampling.BILINEAR)
    assert torch.equal(faces.pixels[0], torch.from_numpy(np.array(middle)).permute(2, 0, 1))
    assert load("lfw-100", "train", (3, 32, 32)).shape == (3, 32, 32)


def test_fashion_mnist_is_read_from_its_files(kept):
    folder = kept / "fashion-mnist"
    folder.mkdir()
    expected = {}
    for stem, count in (("train", 3), ("t10k", 2)):
        images = RANDOM.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        expected[stem] = images
        for kind, head, body in (
            ("images-idx3", [0x803, count, 28, 28], images.tobytes()),
            ("labels-idx1", [0x801, count], bytes(range(count))),
        ):
            with gzip.open(folder / f"{stem}-{kind}-ubyte.gz", "wb") as file:
                file.write(np.array(head, ">u4").tobytes() + body)
    train, whole = load("fashion-mnist", "train"), load("fashion-mnist")
    assert np.array_equal(train.pixels[:, 0].numpy(), expected["train"])
    assert (train.labels.tolist(), train.names[2], train.shape) == ([0, 1, 2], "pullover", (1, 28, 28))
    assert np.array_equal(whole.pixels[3:, 0].numpy(), expected["t10k"])
    path = folder / "train-images-idx3-ubyte.gz"
    whole_file = gzip.decompress(path.read_bytes())
    for broken in (
        b"",
        path.read_bytes()[:50],
        gzip.compress(whole_file[:-1]),
        gzip.compress(b"\0\0\x0d\x03" + whole_file[4:]),
    ):
        path.write_bytes(broken)
        with pytest.raises(Refused, match=r"is broken: download it again|is not an IDX file"):
            load("fashion-mnist", "train")


def test_fashion_mnist_is_downloaded_once_and_compared(kept, monkeypatch, published):
    bodies = {"images-idx3": ([0x803, 2, 28, 28], bytes(2 * 784)), "labels-idx1": ([0x801, 2], b"\0\1")}
    files = {
        f"{stem}-{kind}-ubyte.gz": gzip.compress(np.array(head, ">u4").tobytes() + body)
        for stem in ("train", "t10k")
        for kind, (head, body) in bodies.items()
    }
    published.files = files
    monkeypatch.setattr(idx, "SOURCE", published.address)
    monkeypatch.setattr(idx, "SHA256", {name: hashlib.sha256(body).hexdigest() for name, body in files.items()})
    good, files["t10k-labels-idx1-ubyte.gz"] = files["t10k-labels-idx1-ubyte.gz"], b"a page that says sorry"
    with pytest.raises(
        Failed, match=r"t10k-labels-idx1-ubyte.gz: the file there has changed; download it yourself into .*mnist"
    ):
        load("fashion-mnist")
    assert len(list((kept / "fashion-mnist").iterdir())) == 3
    files["t10k-labels-idx1-ubyte.gz"] = good
    assert load("fashion-mnist", "test").labels.tolist() == [0, 1]
    assert len(load("fashion-mnist")) == 4
    assert sorted(published.asked) == sorted([*files, "t10k-labels-idx1-ubyte.gz"])


@pytest.fixture
def tiny(kept):
    """Tiny-ImageNet's archive, unpacked, with two classes of two images and three to test."""
    root = kept / "tiny-imagenet-200"
    for name, grey in (("n02", 20), ("n01", 10)):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t9\t9\n")
        for number in range(2):
            Image.new("RGB", (64, 64), (grey, 0, number)).save(
                root / "train" / name / f"images/{name}_{number}.JPEG", "PNG"
            )
    for part in ("val", "test"):
        (root / part / "images").mkdir(parents=True)
        for number in range(3):
            Image.new("L", (64, 64), 50 + number).save(root / part / f"images/{part}_{number}.JPEG", "PNG")
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "words.txt").write_text("n01\tant\nn02\tbee\n")
    rows = (("val_2.JPEG", "n01"), ("val_0.JPEG", "n02"), ("val_1.JPEG", "n02"))
    (root / "val" / "val_annotations.txt").write_text("".join(f"{file}\t{name}\t0\t0\t9\t9\n" for file, name in rows))
    return root


def test_tiny_imagenet_is_read_as_its_archive_unpacks(tiny):
    for name in ("tiny-imagenet", str(tiny)):
        train, test, whole = (load(name, split) for split in ("train", "test", "all"))
        assert (train.names, train.shape, part_to_measure(name)) == (("n01", "n02"), (3, 64, 64), "test")
        assert train.labels.tolist() == [0, 0, 1, 1]
        assert train.pixels[:, 0, 0, 0].tolist() == [10, 10, 20, 20]
        assert test.labels.tolist() == [0, 1, 1]
        assert test.pixels[:, 0, 0, 0].tolist() == [52, 50, 51]
        assert torch.equal(whole.pixels, torch.cat([train.pixels, test.pixels.expand(-1, 3, -1, -1)]))
        assert load(name, "test", (3, 32, 32)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("wnids.txt", "", "names no classes"),
        ("wnids.txt", b"\xff\xfe", "cannot read .*wnids.txt"),
        ("wnids.txt", "n01\nn02\nn03\n", "cannot read the folder .*n03"),
        ("val/val_annotations.txt", "val_0.JPEG\tn09\n", "val_annotations.txt, line 1 names no file and class"),
        ("val/val_annotations.txt", "val_0.JPEG\tn01\nval_1.JPEG\n", "line 2 names no file and class"),
        ("val/val_annotations.txt", "../x.JPEG\tn01\n", "line 1 names no file and class"),
        ("val/val_annotations.txt", "val_9.JPEG\tn01\n", "val_9.JPEG is not an image"),
        ("val/val_annotations.txt", "", "holds no images of the test part"),
        ("train/n01/images/note.txt", "hello", "note.txt is not a readable image"),
    ],
)
def test_a_broken_tiny_imagenet_is_refused(tiny, file, content, message):
    (tiny / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Refused, match=message) as caught:
        (load("tiny-imagenet", "test"), load("tiny-imagenet", "train"))
    assert "\n" not in str(caught.value)


def test_mini_imagenet_is_a_folder_of_photographs_made_64_px(kept):
    photo = RANDOM.integers(0, 256, (84, 84, 3), dtype=np.uint8)
    for name in ("crab", "ant"):
        (kept / "mini-imagenet" / name).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(photo).save(kept / "mini-imagenet" / name / f"{number}.png")
    train, test = load("mini-imagenet", "train"), load("mini-imagenet", "test")
    assert (train.shape, len(train), len(test), train.names) == ((3, 64, 64), 8, 2, ("ant", "crab"))
    expected = np.asarray(Image.fromarray(photo).resize((64, 64), Image.Resampling.BILINEAR))
    assert np.array_equal(test.pixels[0].permute(1, 2, 0), expected)


@pytest.mark.parametrize("name", ["gtsrb", "tiny-imagenet", "mini-imagenet", "vggface2-100", "lfw-100"])
def test_a_named_data_set_that_is_not_there_is_refused(name, kept):
    with pytest.raises(Refused, match=f"{name} is not in .*put the image folder {name} there") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_constants_make_sense():
    for name, known in KNOWN.items():
        assert (known.mean is None) == (known.std is None)
        for values in (known.mean, known.std):
            assert values is None or (len(values) == known.shape[0] and all(0.1 < x < 0.7 for x in values)), name


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(0, 4), st.randoms())
def test_clean_subsets_are_even_nested_and_always_the_same(size, number, shuffler):
    labels = torch.tensor(sorted([0, 1, 2, 3] * 12, key=lambda _: shuffler.random()))
    pixels = torch.arange(48, dtype=torch.uint8).view(48, 1, 1, 1)
    images = Images(pixels, labels, tuple("abcd"))
    subset = clean_subset(images, size, number)
    numbers = subset.pixels.flatten().tolist()
    assert len(set(numbers)) == size
    assert subset.labels.tolist() == labels[numbers].tolist()
    counts = subset.labels.bincount(minlength=4)
    assert counts.max() - counts.min() <= 1
    assert set(clean_subset(images, (size + 1) // 2, number).pixels.flatten().tolist()) <= set(numbers)
    assert clean_subset(images, size, number).pixels.flatten().tolist() == numbers


def test_clean_subsets_differ_by_number_and_need_enough_images():
    images = Images(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.arange(9) % 2, ("cat", "dog"))
    chosen = [clean_subset(images, 4, number) for number in range(5)]
    assert len(chosen) == 5
    with pytest.raises(Refused, match=r"class 1 \(dog\) has 4 images, a clean subset of 10 needs 5"):
        clean_subset(images, 10)
    with pytest.raises(Refused, match="at least 1 image, not 0"):
        clean_subset(images, 0)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")
def test_the_packs_are_read_and_agree_with_the_table(monkeypatch):
    monkeypatch.setenv("DHBE_DATA", str(SHARED))
    for name, count, tolerance in (("cifar10", 10_000, 5e-3), ("lfw-100", 299, 1e-2)):
        images, known = load(name, "test"), KNOWN[name]
        assert (images.shape, images.classes, len(images)) == (
            known.shape,
            known.classes,
            pytest.approx(count, rel=0.2),
        )
        pixels = images.pixels.transpose(0, 1).flatten(1).double() / 255
        assert pixels.mean(1).tolist() == pytest.approx(known.mean, abs=tolerance)
        assert pixels.std(1).tolist() == pytest.approx(known.std, abs=tolerance)
