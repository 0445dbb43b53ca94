"""Folders of images, honest and broken."""

import struct

import numpy as np
import pytest
import torch
from conftest import random_pixels
from PIL import Image

from dhbe.data import load
from dhbe.data.folders import load_folder
from dhbe.errors import Refused


@pytest.fixture
def folder(tmp_path):
    """Two classes, three RGB images of 5 x 4 each."""
    root = tmp_path / "images"
    for name in ("cat", "ant"):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(random_pixels(4, 5, 3)).save(root / name / f"{number}.png")
    return root


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
    assert torch.equal(load(str(folder), input_shape=(3, 4, 5)).pixels, grey.pixels.repeat(1, 3, 1, 1))
    Image.fromarray(random_pixels(4, 5, 3)).save(folder / "ant" / "new.png")
    assert load(str(folder)).shape == (3, 4, 5)


def test_mixed_sizes_need_a_shape(folder):
    Image.new("RGBA", (9, 7), (10, 20, 30, 0)).save(folder / "cat" / "big.png")
    with pytest.raises(
        Refused, match=r"mixed sizes: .*0.png is 5 x 4, .*big.png 9 x 7: resize, or give `input_shape=\(C, H, W\)`"
    ):
        load(str(folder))
    images = load(str(folder), input_shape=(3, 8, 6))
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
    test = load(str(root), "test")  # cat is class 1, though it is alone in this part
    assert (test.names, test.labels.tolist()) == (("ant", "cat"), [1])


def test_folders_called_by_numbers_are_these_classes(tmp_path):
    for name in ("2", "10", "007"):
        (tmp_path / name).mkdir()
        Image.fromarray(random_pixels(4, 5, 3)).save(tmp_path / name / "x.png")
    (tmp_path / "classes.txt").write_text("hello")
    images = load(str(tmp_path), classes=12)
    assert images.labels.tolist() == [7, 10, 2]
    assert (images.classes, images.notes) == (12, ())
    (tmp_path / "7").mkdir()
    with pytest.raises(Refused, match="are not distinct class numbers"):
        load(str(tmp_path))


def test_which_folder_is_which_class_is_said_or_asked(folder):
    assert load(str(folder), classes=2).notes == (f"classes of {folder}: 0=ant, 1=cat",)
    assert load(str(folder), order=["cat", "bee", "ant"]).labels.tolist() == [2, 2, 2, 0, 0, 0]
    (folder / "dog").mkdir()
    assert load(str(folder), classes=3).names == ("ant", "cat", "dog")
    with pytest.raises(Refused, match=r"there are 3 class folders \(ant, cat, dog\), but the model has 4 classes: "):
        load(str(folder), classes=4)


def test_what_is_resized_is_said(folder):
    (note,) = load(str(folder), input_shape=(3, 2, 2)).notes[1:]
    assert note == "6 of 6 images were shrunk from 5x4 (or other sizes) to 2x2"


def test_images_below_a_class_folder_belong_to_it_and_tables_beside_them_to_none(folder, tmp_path):
    for place in ("images", ".hidden"):
        (folder / "cat" / place).mkdir()
        Image.fromarray(random_pixels(4, 5, 3)).save(folder / "cat" / place / "x.png")
    (folder / "cat" / "boxes.TXT").write_text("hello")
    (folder / "cat" / "again").symlink_to(folder)
    with pytest.raises(Refused, match="again is not an image"):
        load(str(folder))
    (folder / "cat" / "again").unlink()
    assert load(str(folder)).labels.tolist() == [0, 0, 0, 1, 1, 1, 1]


def spoil(folder, what):
    place = folder / "cat" / "1.png"
    match what:
        case "text":
            (folder / "cat" / "notes.doc").write_text("hello")
        case "stray":
            place.rename(folder / "1.png")
        case "nested":
            for name in ("cat/old", "cat/new", "ant/old", "ant/new"):
                (folder / name).mkdir()
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
        "text": "notes.doc is not a readable image",
        "stray": "1.png lies beside the class folders",
        "nested": "each of the folders ant, cat in .* holds class folders .new, old.: give",
        "truncated": "1.png is broken",
        "empty file": "1.png is not a readable image",
        "16 bits": "1.png has more than 8 bits",
        "postscript": "1.png is not a readable image",
        "bomb": "1.png declares more than 89478485 pixels",
    }.items(),
)
def test_broken_folders_are_refused_by_name(folder, what, message, shape):
    spoil(folder, what)
    with pytest.raises(Refused, match=message) as caught:
        load(str(folder), input_shape=shape)
    assert "\n" not in str(caught.value)


def test_folders_too_small_or_too_large_are_refused(folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(Refused, match="holds no class folders"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(Refused, match="no class has 5 images"):
        load(str(folder), "test")
    with pytest.raises(Refused, match="over the limit"):
        load_folder(folder, limit=6 * 60 - 1)
    assert len(load_folder(folder, limit=6 * 60)) == 6
