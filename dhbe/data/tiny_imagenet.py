"""Tiny-ImageNet as unpacked from its archive: images one level deeper than usual, test classes in a list.

    wnids.txt                       the classes, one per line
    train/CLASS/images/NAME.JPEG    and a list of boxes, which is not read
    val/images/NAME.JPEG
    val/val_annotations.txt         NAME.JPEG, CLASS and a box, between tabs

`val` is the test set; the images in `test` have no published classes.
"""

from pathlib import Path

from dhbe import files
from dhbe.data.folders import Split, load_files, visible
from dhbe.data.images import Images, Shape
from dhbe.errors import Refused

CLASSES, ANNOTATIONS = "wnids.txt", "val/val_annotations.txt"

LARGEST_LIST = 16 * 2**20
"""Maximum size of a list in bytes; the published ones have less than a twentieth of it."""


def holds_tiny_imagenet(root: Path) -> bool:
    """Whether the folder has the structure of the archive."""
    return (root / CLASSES).is_file() and (root / ANNOTATIONS).is_file()


def load_tiny_imagenet(root: Path, split: Split, shape: Shape | None = None) -> Images:
    """The training images, the validation images as test images, or both; classes are sorted by name.

    Args:
        root: The unpacked archive.
        split: Which part.
        shape: As for `load_folder`.

    Raises:
        Refused: A file or a class is missing, or a file is not what it should be.
    """
    names = tuple(sorted(set(_lines(root / CLASSES))))
    if not names:
        raise Refused(f"{root / CLASSES} names no classes: unpack the archive again")
    files = {"train": _train, "test": _test}
    parts = [files[split]] if split in files else list(files.values())
    found = [each for part in parts for each in part(root, names)]
    if not found:
        raise Refused(f"{root} holds no images of the {split} part: unpack the archive again")
    return load_files(found, names, root, shape)


def _train(root: Path, names: tuple[str, ...]) -> list[tuple[Path, int]]:
    return [(path, label) for label, name in enumerate(names) for path in visible(root / "train" / name / "images")]


def _test(root: Path, names: tuple[str, ...]) -> list[tuple[Path, int]]:
    found, labels = [], {name: label for label, name in enumerate(names)}
    for number, line in enumerate(_lines(root / ANNOTATIONS), 1):
        file, label, *_ = [*line.split("\t"), "", ""]
        if label not in labels or Path(file).name != file:
            raise Refused(f"{root / ANNOTATIONS}, line {number} names no file and class of {CLASSES}: unpack it again")
        found.append((root / "val" / "images" / file, labels[label]))
    return found


def _lines(path: Path) -> list[str]:
    try:
        with files.opened(path, LARGEST_LIST) as file:
            return [line for line in file.read().decode().splitlines() if line.strip()]
    except (Refused, OSError, UnicodeDecodeError) as error:
        raise Refused(f"cannot read {path}: unpack the archive again") from error
