"""Known data sets on this machine, in $DHBE_DATA or the user's cache (on Linux, ~/.cache/dhbe)."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from platformdirs import user_cache_path

from dhbe.data.folders import Split, class_folders, load_folder, numbered, own_splits
from dhbe.data.images import Images, Shape
from dhbe.data.packs import load_pack
from dhbe.errors import Refused


def kept() -> Path:
    """The folder of data sets."""
    return Path(os.environ.get("DHBE_DATA") or user_cache_path("dhbe", appauthor=False))


def local_parts(name: str) -> dict[str, list[Path]] | None:
    """Paths of a named data set's parts by `train` and `test`, or by `all` if it has no own split; None if not found.

    Searches, in this order, for NAME_train*.npz with NAME_test*.npz, NAME.npz, and the image folder NAME; then for the same
    with NAME without hyphens.
    """
    for stem in dict.fromkeys((name, name.replace("-", ""))):
        parts = {part: sorted(kept().glob(f"{stem}_{part}*.npz")) for part in ("train", "test")}
        if all(parts.values()):
            return parts
        if (file := kept() / f"{stem}.npz").is_file():
            return {"all": [file]}
        if (folder := kept() / stem).is_dir():
            splits = own_splits(folder)
            return {part: [path] for part, path in splits.items()} if splits else {"all": [folder]}
    return None


def load_parts(
    parts: dict[str, list[Path]],
    split: Split,
    shape: Shape | None,
    middle: int | None = None,
    classes: int | None = None,
    order: Sequence[str] = (),
) -> Images:
    """Loads the images of one part, or of all; the folders of all parts share one numbering.

    Args:
        parts: Folders or .npz files by the name of the part.
        split: Which part.
        shape: As for `load_folder`.
        middle: As for `load_folder`.
        classes: As for `numbered`.
        order: As for `numbered`.

    Raises:
        Refused: A file is broken, the parts differ in image size, or the assignment of folders to classes is ambiguous.
    """
    wanted = [path for part, paths in parts.items() if split in ("all", part) for path in paths]
    folders = {each.name for paths in parts.values() for path in paths if path.is_dir() for each in class_folders(path)}
    numbering = numbered(sorted(folders), order, classes) if folders else None
    read = [
        load_folder(path, shape, middle=middle, numbering=numbering)
        if path.is_dir()
        else load_pack(path, shape, middle=middle)
        for path in wanted
    ]
    if len({each.shape for each in read}) > 1:
        raise Refused(f"{wanted[0]} and {wanted[-1]} differ in their image sizes: resize, or give --input=CxHxW")
    names = max((each.names for each in read), key=len)
    if len(read) == 1:
        return replace(read[0], names=names)
    notes = tuple(dict.fromkeys(note for each in read for note in each.notes))
    return Images(torch.cat([each.pixels for each in read]), torch.cat([each.labels for each in read]), names, notes)
