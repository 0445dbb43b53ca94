"""Data sets as whole tensors: `load` finds them, `Images` holds them."""

from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from dhbe.data.cifar import ARCHIVES, load_cifar
from dhbe.data.folders import Split, class_names, load_folder, load_image, own_splits
from dhbe.data.images import Images, Shape, to_uint8
from dhbe.data.packs import load_pack, read_pack
from dhbe.errors import Refused

__all__ = ["Images", "Shape", "Split", "load", "load_image", "part_to_measure", "read_pack", "to_uint8"]

DIGITS = {"digits": 32, "digits16": 16}
"""Side in pixels of scikit-learn's handwritten digits, by name."""


def load(data: str, split: Split = "all", shape: Shape | None = None) -> Images:
    """Finds and loads a data set.

    Data without a split of its own is split by class and always alike: a fifth of each class, rounded down, is the
    test set, the rest the training set.

    Args:
        data: `digits` or `digits16` (scikit-learn's handwritten digits, RGB of 32 or 16 px), `cifar10`, `cifar100`, an
            image folder (one sub-folder a class, or such folders inside `train` and `test` or `val`), or an .npz file
            with `images` uint8 [n, h, w, c] and `labels` [n].
        split: Which part.
        shape: Shape (c, h, w) that the caller needs. Image files are converted to it, other data that differs is
            refused. None takes the data as it is.

    Returns:
        At least one image, on the CPU.

    Raises:
        Refused: There is no such data, it is broken, it does not fit `shape`, or the part is empty.
        Failed: A download did not succeed.
    """
    if split not in get_args(Split):
        raise Refused(f"no split {split!r}; there are {', '.join(get_args(Split))}")
    try:
        images = _find(data, split, shape)
    except OSError as error:  # a name too long, a folder that may not be entered
        raise Refused(f"cannot read {data[:200]!r}: {(error.strerror or 'unreadable').lower()}") from error
    if shape is not None and images.shape != shape:
        has, takes = ("x".join(map(str, sides)) for sides in (images.shape, shape))
        raise Refused(f"{data}: the images are {has}, the classifier takes {takes}: convert them or give other data")
    return images


def part_to_measure(data: str) -> Split:
    """The part of a data set that a model is measured on: its test images, or all where the data has no own split."""
    split = data in DIGITS or data in ARCHIVES or (Path(data).is_dir() and own_splits(Path(data)) is not None)
    return "test" if split else "all"


def _find(data: str, split: Split, shape: Shape | None) -> Images:
    if data in ARCHIVES:
        return load_cifar(data, split)
    if data in DIGITS:
        return _part(_digits(DIGITS[data]), split, data)
    path = Path(data)
    if path.is_dir():
        return _folder(path, split, shape)
    if path.suffix.lower() == ".npz":
        return _part(load_pack(path), split, data)
    known = ", ".join((*DIGITS, *ARCHIVES))
    raise Refused(f"no data called {data!r}: give one of {known}, an image folder, or an .npz file")


def _digits(side: int) -> Images:
    """The 1797 digits of scikit-learn, 8 x 8 in 17 shades, enlarged bilinearly."""
    from sklearn.datasets import load_digits  # takes a second, which other data need not pay

    shades, labels = load_digits(return_X_y=True)
    grey = torch.tensor(shades, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    pixels = to_uint8(F.interpolate(grey, size=(side, side), mode="bilinear", align_corners=False))
    return Images(pixels.repeat(1, 3, 1, 1), torch.tensor(labels, dtype=torch.int64), tuple("0123456789"))


def _folder(root: Path, split: Split, shape: Shape | None) -> Images:
    folders = own_splits(root)
    if folders is None:
        return _part(load_folder(root, shape), split, str(root))
    if class_names(folders["train"]) != class_names(folders["test"]):  # or one part would number them differently
        raise Refused(f"{folders['train']} and {folders['test']} differ in their classes: both need all of them")
    if split != "all":
        return load_folder(folders[split], shape)
    train, test = load_folder(folders["train"], shape), load_folder(folders["test"], shape)
    if train.shape != test.shape:
        raise Refused(
            f"{folders['train']} and {folders['test']} differ in their image sizes: resize, or give --input CxHxW"
        )
    return Images(torch.cat([train.pixels, test.pixels]), torch.cat([train.labels, test.labels]), train.names)


def _part(images: Images, split: Split, source: str) -> Images:
    if split == "all":
        return images
    tested = _tested(images.labels)
    if not tested.any():
        raise Refused(f"{source}: no class has 5 images, so a fifth of each is no test set: give more images")
    return images.subset(tested if split == "test" else ~tested)


def _tested(labels: Tensor) -> Tensor:
    """Which images are in the test set, bool [n]: a fifth of each class, by a permutation that is always the same."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    tested = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        tested[members[: len(members) // 5]] = True
    return tested
