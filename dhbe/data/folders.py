"""Image folders: one sub-folder per class."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
"""Formats that are decoded. Pillow supports more, but passes some of them (EPS) to other programs."""

EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
"""Pillow's modes that convert to 8-bit grey or RGB without loss of range."""

HIDDEN_ON_WINDOWS = {"Thumbs.db", "desktop.ini"}

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
"""Suffixes of image files, which are refused beside class folders: they would be ignored silently."""

OTHER_SUFFIXES = {
    ".csv",
    ".db",
    ".html",
    ".ini",
    ".json",
    ".jsonl",
    ".log",
    ".mat",
    ".md",
    ".tsv",
    ".txt",
    ".xml",
    ".yaml",
    ".yml",
}
"""Suffixes of files with annotations, which may lie between the images of a class."""

DEEPEST = 8
"""Maximum depth of folders below a class folder."""

SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
"""The part that a folder holds, by its name in lower case."""

ROTATION = 0x0112
"""EXIF's tag of the orientation; 1 is upright."""

MOST_CLASSES = 100_000
"""Number of classes above which labels or folder names are considered wrong."""

SHOWN = 12
"""Maximum number of classes listed in a message."""

Split = Literal["train", "test", "all"]


def own_splits(root: Path) -> dict[str, Path] | None:
    """The folders `train` and `test` (or `val`) of a data set with its own split; None if it has none.

    Other usual names for them count too. A folder with two classes called train and test looks the same; rename one then.
    """
    inside = [path for path in visible(root) if path.is_dir()]
    parts = {SPLITS.get(path.name.lower(), path.name): path for path in inside}
    if len(parts) < len(inside) or set(parts) not in ({"train", "test"}, {"train", "val"}, {"train", "val", "test"}):
        return None
    return {"train": parts["train"], "test": parts["test" if "test" in parts else "val"]}


@dataclass
class Seen:
    """What was noticed while images were decoded."""

    resized: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of each image that was resized."""
    turned: int = 0
    """Number of images with a rotation in their EXIF data."""
    see_through: int = 0
    """Number of images with transparent pixels."""

    def notes(self, count: int, shape: Shape) -> tuple[str, ...]:
        """One line each on what happened to some of `count` images."""
        said = []
        if self.resized:
            (width, height), (_, to_height, to_width) = self.resized[0], shape
            how = "shrunk" if width * height > to_width * to_height else "enlarged"
            said.append(
                f"{len(self.resized)} of {count} images were {how} from {width}x{height} (or other sizes) to {to_width}x{to_height}"
            )
        if self.turned:
            said.append(
                f"{self.turned} of {count} images are to be turned by their EXIF data: read as stored, as by torchvision"
            )
        if self.see_through:
            said.append(
                f"{self.see_through} of {count} images have transparent pixels: read in the colours behind, as by torchvision"
            )
        return tuple(said)


@dataclass(frozen=True)
class Numbering:
    """The assignment of folders to classes."""

    labels: dict[str, int]
    """Class number of each folder by name."""
    names: tuple[str, ...]
    """Names of all classes in order."""

    def __str__(self) -> str:
        listed = [
            f"{number}={foreign.name(name)}" for name, number in sorted(self.labels.items(), key=lambda item: item[1])
        ]
        return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")


def class_folders(root: Path) -> list[Path]:
    """The class folders in `root`, sorted by name; other files are ignored.

    Raises:
        Refused: There are none, or there is an image file beside them.
    """
    inside = visible(root)
    if stray := next((path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()), None):
        raise Refused(f"{stray} lies beside the class folders: an image folder holds one sub-folder per class")
    folders = [path for path in inside if path.is_dir()]
    if not folders:
        raise Refused(f"{root} holds no class folders: an image folder holds one sub-folder per class")
    inner = _below(folders[0])
    if len(inner) > 1 and all(_below(folder) == inner for folder in folders[1:]):
        raise Refused(
            f"{'each of the folders' if folders[1:] else 'the only folder'} {', '.join(folder.name for folder in folders[:SHOWN])} in "
            f"{root} holds class folders ({', '.join(sorted(inner)[:SHOWN])}): give {folders[0]}"
        )
    return folders


def _below(folder: Path) -> set[str]:
    return {path.name for path in visible(folder) if path.is_dir()}


def numbered(folders: Sequence[str], order: Sequence[str] = (), classes: int | None = None) -> Numbering:
    """Assigns folders to classes.

    Folders whose names are all numbers are these classes. Others are numbered by `order`, or by their sorted names if
    there are as many as classes.

    Args:
        folders: Names of the folders.
        order: Names of all classes in order, if known.
        classes: Number of classes; None if unknown.

    Raises:
        Refused: A folder is not one of the known classes, or the assignment is ambiguous.

    >>> numbered(["10", "02"]).labels
    {'02': 2, '10': 10}
    >>> numbered(["dog", "cat"], classes=2).labels
    {'cat': 0, 'dog': 1}
    >>> numbered(["dog"], order=["cat", "dog"]).labels
    {'dog': 1}
    """
    folders = sorted(folders)
    first = [words[0] for name in order if (words := name.split(maxsplit=1))]  # as in WordNet's "n01440764 tench"
    for names in (list(order), first):
        if order and set(folders) <= set(names) and len(set(names)) == len(order):
            return Numbering({name: names.index(name) for name in folders}, tuple(order))
    if all(name.isascii() and name.isdecimal() for name in folders):
        labels = {name: int(name) for name in folders}
        if len(set(labels.values())) < len(folders) or max(labels.values()) >= MOST_CLASSES:
            raise Refused(
                f"the folders {', '.join(folders[:SHOWN])} are not distinct class numbers from 0: rename them"
            )
        return Numbering(labels, tuple(map(str, range(max(classes or 0, 1 + max(labels.values()))))))
    if order:
        strange = sorted(set(folders) - set(order))
        raise Refused(
            f"the folder {strange[0]} is not one of the classes ({', '.join(order[:SHOWN])}): "
            "give --class-names, one per class, in the order of the model's classes"
        )
    if classes not in (None, len(folders)):
        raise Refused(
            f"there are {len(folders)} class folders ({', '.join(folders[:SHOWN])}), but the model has {classes} classes: "
            "give --class-names, one per class, or name the folders by class numbers"
        )
    return Numbering({name: number for number, name in enumerate(folders)}, tuple(folders))


def load_folder(
    root: Path,
    shape: Shape | None = None,
    limit: int = LIMIT,
    middle: int | None = None,
    numbering: Numbering | None = None,
) -> Images:
    """Loads images from a folder with one sub-folder per class; files are sorted by name.

    Args:
        root: The folder. Hidden files are ignored, and so is anything beside the class folders that is not an image, and
            annotations between the images. Images in folders below a class folder belong to this class.
        shape: Shape (c, h, w) to which images are resized (bilinearly) and converted, to grey or RGB. None keeps their
            size, which must be the same for all; they are grey if all of them are.
        limit: Maximum size of the pixels in bytes.
        middle: Side in pixels of the central square to which larger images are cropped first; None does not crop.
        numbering: The assignment of folders to classes; None means `numbered`.

    Raises:
        Refused: There are no classes or no images, a file is not an image, an image is broken or huge, or sizes are mixed.
    """
    folders = class_folders(root)
    numbering = numbering or numbered([folder.name for folder in folders])
    paths = [(path, numbering.labels[folder.name]) for folder in folders for path in pictures_below(folder)]
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
    """Loads images from files with their classes; `root` appears in messages, for the rest see `load_folder`.

    Raises:
        Refused: A file is not an image, or is broken or huge; or sizes are mixed.
    """
    paths = [path for path, _ in files]
    shape = shape or _common_shape(paths)
    check_size(len(paths), shape, root, limit)
    pixels = torch.empty(len(paths), *shape, dtype=torch.uint8)
    seen = Seen()
    for number, path in enumerate(paths):
        pixels[number] = decode(path, path, shape, middle, seen)
    return Images(pixels, torch.tensor([label for _, label in files]), names, seen.notes(len(paths), shape))


def load_image(path: Path, shape: Shape) -> torch.Tensor:
    """One image file as pixels in [0, 1], float [c, h, w], resized to `shape`.

    Raises:
        Refused: It is not an image, or is broken or huge.
    """
    return decode(path, path, shape).float() / 255


def visible(folder: Path) -> list[Path]:
    """The content of a folder, sorted by name, without hidden files.

    Raises:
        Refused: It cannot be read.
    """
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise Refused(f"cannot read the folder {folder}: {(error.strerror or 'unreadable').lower()}") from error
    return [path for path in inside if not path.name.startswith(".") and path.name not in HIDDEN_ON_WINDOWS]


def pictures_below(folder: Path, depth: int = 0) -> Iterator[Path]:
    """The images in a folder, sorted by name, and those in folders below it; links to folders there are not followed."""
    for path in visible(folder):
        if path.is_dir() and not path.is_symlink() and depth < DEEPEST:
            yield from pictures_below(path, depth + 1)
        elif path.suffix.lower() not in OTHER_SUFFIXES:
            yield path


def _common_shape(paths: Sequence[Path]) -> Shape:
    first, grey = None, True
    for path in paths:
        with _open(path, path) as image:
            first = first or (path, image.size)
            if image.size != first[1]:
                (a, b), (c, d) = first[1], image.size
                raise Refused(f"mixed sizes: {first[0]} is {a} x {b}, {path} {c} x {d}: resize, or give --input=CxHxW")
            grey = grey and image.mode in ("1", "L")
    assert first is not None
    width, height = first[1]
    return (1 if grey else 3), height, width


def _open(file: Path | BytesIO, name: object) -> Image.Image:
    """Opens an image and checks its header; pixels are not decoded yet."""
    if isinstance(file, Path) and not file.is_file():
        raise Refused(f"{name} is not an image: a class folder holds image files only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise Refused(f"{name} declares more than {Image.MAX_IMAGE_PIXELS} pixels: remove or shrink it") from error
        except Exception as error:  # decoders of broken headers may raise anything
            raise Refused(f"{name} is not a readable image ({', '.join(FORMATS)}): remove or repair it") from error
    if image.mode not in EIGHT_BITS:
        image.close()
        raise Refused(f"{name} has more than 8 bits per channel (mode {image.mode}): save it with 8")
    return image


def decode(
    file: Path | BytesIO,
    name: object,
    shape: Shape | None = None,
    middle: int | None = None,
    seen: Seen | None = None,
) -> torch.Tensor:
    """Decodes an image to uint8 [c, h, w].

    Args:
        file: The encoded image.
        name: Its name in messages.
        shape: Shape (c, h, w) to which it is converted; None keeps its size, in RGB.
        middle: Side in pixels of the central square to which a larger image is cropped first.
        seen: Receives what is noticed.

    Raises:
        Refused: It is not an image, is broken or huge, or has more than 8 bits per channel.
    """
    channels = shape[0] if shape else 3
    if channels not in (1, 3):
        raise Refused(f"image files have 1 or 3 channels, the classifier takes {channels}: use an .npz")
    with _open(file, name) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about palettes and metadata
        try:
            plain = image.convert("L" if channels == 1 else "RGB")
            if seen:
                with suppress(Exception):  # broken EXIF data says nothing
                    seen.turned += image.getexif().get(ROTATION, 1) != 1
                seen.see_through += (
                    image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255
                )
        except Exception as error:  # as above
            raise Refused(f"{name} is broken and cannot be decoded: remove or repair it") from error
    if middle and min(plain.size) > middle:
        left, top = ((side - middle) // 2 for side in plain.size)
        plain = plain.crop((left, top, left + middle, top + middle))
    if shape and plain.size != (shape[2], shape[1]):
        if seen:
            seen.resized.append(plain.size)
        plain = plain.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(plain)).view(plain.size[1], plain.size[0], channels).permute(2, 0, 1)
