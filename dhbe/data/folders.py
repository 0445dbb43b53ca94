"""Image folders: one sub-folder a class."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from dhbe import foreign
from dhbe.data.images import LIMIT, Images, Shape, check_size
from dhbe.errors import Refused

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""Formats that are decoded. Pillow knows more, and hands some of them (EPS) to other programs."""

EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
"""Pillow's modes that convert to 8-bit grey or RGB without loss of range."""

HIDDEN_ON_WINDOWS = {"Thumbs.db", "desktop.ini"}

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
"""What an image file beside the class folders ends in: it would be lost without a word."""

MOST_CLASSES = 100_000
"""More classes than this are taken for a mistake in the labels or in the names of folders."""

SHOWN = 12
"""Classes that a message lists."""

Split = Literal["train", "test", "all"]


def own_splits(root: Path) -> dict[str, Path] | None:
    """The folders `train` and `test` (or `val`) of a data set that is split already; None if it is not.

    A folder with classes called train and test would look the same; then rename one.
    """
    names = {path.name for path in visible(root) if path.is_dir()}
    if names not in ({"train", "test"}, {"train", "val"}, {"train", "val", "test"}):
        return None
    return {"train": root / "train", "test": root / ("test" if "test" in names else "val")}


@dataclass(frozen=True)
class Numbering:
    """Which folder is which class."""

    labels: dict[str, int]
    """Number of each folder, by its name."""
    names: tuple[str, ...]
    """Of all classes, by their numbers."""

    def __str__(self) -> str:
        listed = [
            f"{number}={foreign.name(name)}" for name, number in sorted(self.labels.items(), key=lambda item: item[1])
        ]
        return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")


def class_folders(root: Path) -> list[Path]:
    """The folders of the classes, in the order of names; files beside them are passed over.

    Raises:
        Refused: There are none, or an image lies beside them.
    """
    inside = visible(root)
    if stray := next((path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()), None):
        raise Refused(f"{stray} lies beside the class folders: an image folder holds one sub-folder a class")
    folders = [path for path in inside if path.is_dir()]
    if not folders:
        raise Refused(f"{root} holds no classes: an image folder holds one sub-folder a class")
    return folders


def numbered(folders: Sequence[str], order: Sequence[str] = (), classes: int | None = None) -> Numbering:
    """Tells which folder is which class.

    Folders that are all called by numbers are these classes. Others are numbered by `order`, or by their sorted names
    if there are as many as classes.

    Args:
        folders: Their names.
        order: Names of all classes by their numbers, as far as they are known.
        classes: How many there are; None if nobody says.

    Raises:
        Refused: A folder is of no known class, or which class it is cannot be told.

    >>> numbered(["10", "02"]).labels
    {'02': 2, '10': 10}
    >>> numbered(["dog", "cat"], classes=2).labels
    {'cat': 0, 'dog': 1}
    >>> numbered(["dog"], order=["cat", "dog"]).labels
    {'dog': 1}
    """
    folders = sorted(folders)
    if order and set(folders) <= set(order):
        return Numbering({name: list(order).index(name) for name in folders}, tuple(order))
    if all(name.isascii() and name.isdecimal() for name in folders):
        labels = {name: int(name) for name in folders}
        if len(set(labels.values())) < len(folders) or max(labels.values()) >= MOST_CLASSES:
            raise Refused(f"the folders {', '.join(folders[:SHOWN])} are no class numbers from 0: rename them")
        return Numbering(labels, tuple(map(str, range(max(classes or 0, 1 + max(labels.values()))))))
    if order:
        strange = sorted(set(folders) - set(order))
        raise Refused(
            f"the folder {strange[0]} is none of the classes ({', '.join(order[:SHOWN])}): "
            "give --class-names FILE, one name a line, in the order of the model's classes"
        )
    if classes not in (None, len(folders)):
        raise Refused(
            f"there are {len(folders)} class folders ({', '.join(folders[:SHOWN])}), and the model has {classes} classes: "
            "which is which? Give --class-names FILE, one name a line, or call the folders by their numbers"
        )
    return Numbering({name: number for number, name in enumerate(folders)}, tuple(folders))


def load_folder(
    root: Path,
    shape: Shape | None = None,
    limit: int = LIMIT,
    middle: int | None = None,
    numbering: Numbering | None = None,
) -> Images:
    """Images from a folder with one sub-folder a class; files in the order of their names.

    Args:
        root: The folder. Hidden files are passed over, and so is what lies beside the class folders and is no image.
        shape: Images of other sizes are resized (bilinear), and made grey or RGB as its channels say. None keeps
            their size, which must be one and the same; they are grey if all of them are.
        limit: Bytes that the pixels may take.
        middle: Side in pixels of the square that is cut out of the middle of larger images first; None cuts nothing.
        numbering: Which folder is which class; None takes `numbered`.

    Raises:
        Refused: No classes, no image, a file among them that is none, a broken or huge image, mixed sizes.
    """
    folders = class_folders(root)
    numbering = numbering or numbered([folder.name for folder in folders])
    paths = [(path, numbering.labels[folder.name]) for folder in folders for path in visible(folder)]
    if not paths:
        raise Refused(f"the class folders of {root} are empty: put images there")
    images = load_files(paths, tuple(map(foreign.name, numbering.names)), root, shape, limit, middle)
    plain = all(name.isdecimal() and int(name) == number for name, number in numbering.labels.items())
    notes = images.notes if plain else (f"classes of {root}: {numbering}", *images.notes)
    return replace(images, notes=notes)


def load_files(
    files: Sequence[tuple[Path, int]],
    names: tuple[str, ...],
    root: Path,
    shape: Shape | None = None,
    limit: int = LIMIT,
    middle: int | None = None,
) -> Images:
    """Images from files, each given with its class; `root` is what messages call them, for the rest see `load_folder`.

    Raises:
        Refused: A file is no image, or broken or huge; mixed sizes.
    """
    paths = [path for path, _ in files]
    shape = shape or _common_shape(paths)
    check_size(len(paths), shape, root, limit)
    pixels = torch.empty(len(paths), *shape, dtype=torch.uint8)
    resized: list[tuple[int, int]] = []
    for number, path in enumerate(paths):
        pixels[number] = decode(path, path, shape, middle, resized)
    return Images(pixels, torch.tensor([label for _, label in files]), names, resizing(resized, len(paths), shape))


def resizing(resized: Sequence[tuple[int, int]], count: int, shape: Shape) -> tuple[str, ...]:
    """What is worth knowing of images that were of other sizes (width, height)."""
    if not resized:
        return ()
    (width, height), (_, to_height, to_width) = resized[0], shape
    how = "shrunk" if width * height > to_width * to_height else "enlarged"
    return (
        f"{len(resized)} of {count} images were {how} from {width}x{height} (or other sizes) to {to_width}x{to_height}",
    )


def load_image(path: Path, shape: Shape) -> torch.Tensor:
    """One image file as pixels in [0, 1], float [c, h, w], resized to `shape`.

    Raises:
        Refused: It is no image, or broken or huge.
    """
    return decode(path, path, shape).float() / 255


def visible(folder: Path) -> list[Path]:
    """What a folder holds, in the order of names, but for hidden files.

    Raises:
        Refused: It cannot be read.
    """
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise Refused(f"cannot read the folder {folder}: {(error.strerror or 'unreadable').lower()}") from error
    return [path for path in inside if not path.name.startswith(".") and path.name not in HIDDEN_ON_WINDOWS]


def _common_shape(paths: Sequence[Path]) -> Shape:
    first, grey = None, True
    for path in paths:
        with _open(path, path) as image:
            first = first or (path, image.size)
            if image.size != first[1]:
                (a, b), (c, d) = first[1], image.size
                raise Refused(f"mixed sizes: {first[0]} is {a} x {b}, {path} {c} x {d}: resize, or give --input CxHxW")
            grey = grey and image.mode in ("1", "L")
    assert first is not None
    width, height = first[1]
    return (1 if grey else 3), height, width


def _open(file: Path | BytesIO, name: object) -> Image.Image:
    """The image with its header read and judged, its pixels not yet."""
    if isinstance(file, Path) and not file.is_file():
        raise Refused(f"{name} is no image: a class folder holds image files only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise Refused(f"{name} declares more than {Image.MAX_IMAGE_PIXELS} pixels: remove or shrink it") from error
        except Exception as error:  # decoders raise whatever a broken header leads them to
            raise Refused(f"{name} is no image that can be read ({', '.join(FORMATS)}): remove or mend it") from error
    if image.mode not in EIGHT_BITS:
        image.close()
        raise Refused(f"{name} has more than 8 bits a channel (mode {image.mode}): save it with 8")
    return image


def decode(
    file: Path | BytesIO,
    name: object,
    shape: Shape | None = None,
    middle: int | None = None,
    resized: list[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """An encoded image as uint8 [c, h, w].

    Args:
        file: Where it is.
        name: What messages call it.
        shape: Shape (c, h, w) that it is converted to; None keeps its size, in RGB.
        middle: Side in pixels of the square that is cut out of the middle of a larger image first.
        resized: Takes note of the width and height of an image that is shrunk or enlarged.

    Raises:
        Refused: It is no image, broken or huge, or has more than 8 bits a channel.
    """
    channels = shape[0] if shape else 3
    if channels not in (1, 3):
        raise Refused(f"image files have 1 or 3 channels, the classifier takes {channels}: use an .npz")
    with _open(file, name) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on palettes and metadata
        try:
            plain = image.convert("L" if channels == 1 else "RGB")
        except Exception as error:  # as above
            raise Refused(f"{name} is broken and cannot be decoded: remove or mend it") from error
    if middle and min(plain.size) > middle:
        left, top = ((side - middle) // 2 for side in plain.size)
        plain = plain.crop((left, top, left + middle, top + middle))
    if shape and plain.size != (shape[2], shape[1]):
        if resized is not None:
            resized.append(plain.size)
        plain = plain.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(plain)).view(plain.size[1], plain.size[0], channels).permute(2, 0, 1)
