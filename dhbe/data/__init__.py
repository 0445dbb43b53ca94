"""Data sets as whole tensors: `load` finds them, `Images` holds them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from dhbe import files, foreign
from dhbe.data.cifar import ARCHIVES, load_cifar
from dhbe.data.folders import Split, load_image, own_splits
from dhbe.data.idx import holds_idx, load_idx
from dhbe.data.images import Images, Shape, to_uint8
from dhbe.data.known import KNOWN, NORMALISATION
from dhbe.data.local import kept, load_parts, local_parts
from dhbe.data.packs import read_pack
from dhbe.data.pictures import load_pictures
from dhbe.data.tiny_imagenet import holds_tiny_imagenet, load_tiny_imagenet
from dhbe.errors import Refused

__all__ = [
    "DIGITS", "KNOWN", "NORMALISATION", "Images", "Shape", "Split", "class_names", "clean_subset", "load", "load_image", "load_pictures", "part_to_measure", "read_pack", "to_uint8",
]  # fmt: skip

DIGITS = {"digits": 32, "digits16": 16}
"""Side in pixels of scikit-learn's handwritten digits, by name."""

LARGEST_LIST = 2**24
"""Maximum size of a list of class names in bytes."""


def load(
    data: str,
    split: Split = "all",
    input_shape: Shape | None = None,
    *,
    classes: int | None = None,
    order: Sequence[str] = (),
) -> Images:
    """Finds and loads a data set.

    Data without its own split is split deterministically by class: a fifth of each class, rounded down, is the test set,
    the rest the training set.

    Args:
        data: `digits` or `digits16` (scikit-learn's handwritten digits, RGB of 32 or 16 px), `cifar10`, `cifar100`,
            `fashion-mnist`, another name in `KNOWN` whose files are in $DHBE_DATA, an image folder (one sub-folder per
            class, or such folders inside `train` and `test` or `val`, or Tiny-ImageNet's archive unpacked), or an .npz
            file (see `load_pack`).
        split: Which part.
        input_shape: Required shape (c, h, w). Image files are converted to it, other data of another shape is refused. None
            accepts any shape.
        classes: Number of the model's classes. An image folder must have as many, unless its names identify the classes;
            None skips this check.
        order: The model's class names in order, to which image folders are matched.

    Returns:
        At least one image, on the CPU.

    Raises:
        Refused: There is no such data, it is broken, it does not fit `input_shape`, or the part is empty.
        Failed: A download did not succeed.
    """
    if split not in get_args(Split):
        raise Refused(f"no split {split!r}; available: {', '.join(get_args(Split))}")
    try:
        images = _find(data, split, input_shape, Model(classes, tuple(order)))
    except OSError as error:  # a name too long, a folder without permission
        raise Refused(f"cannot read {data[:200]!r}: {(error.strerror or 'unreadable').lower()}") from error
    if input_shape not in (None, images.shape):
        has, takes = ("x".join(map(str, sides)) for sides in (images.shape, input_shape))
        raise Refused(f"{data}: the images are {has}, the classifier takes {takes}: convert them or give other data")
    if data in (*DIGITS, *KNOWN) and Path(data).exists():
        note = f"{data} means the data set of this name; for the local file or folder, give ./{data}"
        images = replace(images, notes=(note, *images.notes))
    return images


def class_names(path: Path) -> tuple[str, ...]:
    """Reads class names in the order of the classes: a text file, one per line, or JSON, a list or names by number.

    Raises:
        Refused: It cannot be read, or names a class twice.
    """
    try:
        with files.opened(path) as file:
            text = file.read(LARGEST_LIST).decode("utf-8-sig").strip()
        names = (
            _in_json(text) if text[:1] in "[{" else tuple(line.strip() for line in text.splitlines() if line.strip())
        )
    except (Refused, OSError, ValueError, LookupError, RecursionError) as error:
        raise Refused(
            f"cannot read the class names in {foreign.name(path)}: give a text file, one name per line, or a JSON list"
        ) from error
    if len(names) < 2 or len(set(names)) < len(names):
        raise Refused(f"{path} must list all classes, each once and on its own line, in the order of their numbers")
    return names


def _in_json(text: str) -> tuple[str, ...]:
    content = json.loads(text)
    if isinstance(content, dict):  # {"0": "cat", ...}, or with further words as in {"0": ["n02123045", "tabby"], ...}
        content = [content[str(number)] for number in range(len(content))]
    return tuple(" ".join(map(str, each)) if isinstance(each, list) else str(each) for each in content)


def part_to_measure(data: str) -> Split:
    """The part of a data set to measure on: its test images, or all images if the data has no split of its own."""
    split = data in DIGITS or data in KNOWN or _is_split(Path(data))
    return "test" if split else "all"


def clean_subset(images: Images, size: int, number: int = 0) -> Images:
    """A class-balanced random subset, for a defender with little data; deterministic for a `number`.

    The paper uses 250, 500, 1000 or 2000 images, five subsets each (numbers 0 to 4). Class counts differ by at most 1. For
    the same number, smaller subsets are contained in larger ones.

    Args:
        images: The images to choose from.
        size: Size of the subset.
        number: Seed of the subset.

    Raises:
        Refused: A class has too few images, or `size` is less than 1.
    """
    generator = torch.Generator().manual_seed(number)
    order = torch.randperm(len(images), generator=generator).to(images.labels.device)
    shuffled = images.labels[order]
    rank = torch.empty_like(order)  # rank of each image within its class
    for label in range(images.classes):
        members = (shuffled == label).nonzero().flatten()
        share = (size + images.classes - 1 - label) // images.classes
        if len(members) < share:
            raise Refused(
                f"class {label} ({images.names[label]}) has {len(members)} images, a clean subset of {size} needs {share}"
            )
        rank[members] = torch.arange(len(members), device=order.device)
    if size < 1:
        raise Refused(f"a clean subset needs at least 1 image, not {size}")
    first = (rank * images.classes + shuffled).argsort()[:size]
    return images.subset(order[first])


def _is_split(path: Path) -> bool:
    return holds_tiny_imagenet(path) or (path.is_dir() and own_splits(path) is not None)


@dataclass(frozen=True)
class Model:
    """What is known about the classes of the model that the data is for."""

    classes: int | None
    order: tuple[str, ...]


def _find(data: str, split: Split, shape: Shape | None, model: Model) -> Images:
    if data in DIGITS:
        return _part(_digits(DIGITS[data]), split, data)
    if data in KNOWN:
        return _named(data, split, shape, model)
    path = Path(data)
    if holds_tiny_imagenet(path):
        return load_tiny_imagenet(path, split, shape)
    if path.is_dir():
        splits = own_splits(path)
        parts = {part: [inside] for part, inside in splits.items()} if splits else {"all": [path]}
        return _parted(parts, split, shape, data, model)
    if path.suffix.lower() == ".npz":
        return _parted({"all": [path]}, split, shape, data, model)
    if path.exists():
        raise Refused(
            f"{data} is neither an image folder nor an .npz file: save its images with "
            "numpy.savez('data.npz', images=..., labels=...), uint8 [n, h, w, c] and integers [n]"
        )
    known = (*DIGITS, *ARCHIVES, "fashion-mnist")
    others = ", ".join(name for name in KNOWN if name not in known)
    raise Refused(
        f"no data called {data!r}: give one of {', '.join(known)}, an image folder, or an .npz file; or one of {others}, "
        "which you have put into $DHBE_DATA"
    )


def _named(name: str, split: Split, shape: Shape | None, model: Model) -> Images:
    known, folder = KNOWN[name], kept() / name
    for unpacked in (folder, kept() / f"{name}-200"):  # its archive is called tiny-imagenet-200
        if holds_tiny_imagenet(unpacked):
            return load_tiny_imagenet(unpacked, split, shape or known.shape)
    if holds_idx(folder) or (name == "fashion-mnist" and not local_parts(name)):
        return load_idx(folder, split)
    if parts := local_parts(name):
        return _parted(parts, split, shape or known.shape, name, model, known.middle)
    if name in ARCHIVES:
        return load_cifar(name, split)
    raise Refused(
        f"{name} is not in {kept()} ($DHBE_DATA): put the image folder {name} there, one sub-folder a class, "
        f"perhaps inside train and test; or {name}.npz"
    )


def _parted(
    parts: dict[str, list[Path]],
    split: Split,
    shape: Shape | None,
    source: str,
    model: Model,
    middle: int | None = None,
) -> Images:
    if "all" in parts:
        return _part(load_parts(parts, "all", shape, middle, model.classes, model.order), split, source)
    return load_parts(parts, split, shape, middle, model.classes, model.order)


def _digits(side: int) -> Images:
    """The 1797 digits of scikit-learn, 8 x 8 pixels in 17 shades, enlarged bilinearly."""
    from sklearn.datasets import load_digits  # a slow import

    shades, labels = load_digits(return_X_y=True)
    grey = torch.tensor(shades, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    pixels = to_uint8(F.interpolate(grey, size=(side, side), mode="bilinear", align_corners=False))
    return Images(pixels.repeat(1, 3, 1, 1), torch.tensor(labels, dtype=torch.int64), tuple("0123456789"))


def _part(images: Images, split: Split, source: str) -> Images:
    if split == "all":
        return images
    tested = _tested(images.labels)
    if not tested.any():
        raise Refused(f"{source}: no class has 5 images, so a fifth of each is no test set: give more images")
    return images.subset(tested if split == "test" else ~tested)


def _tested(labels: Tensor) -> Tensor:
    """Which images are in the test set, bool [n]: a fifth of each class, by a fixed permutation."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    tested = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        tested[members[: len(members) // 5]] = True
    return tested
