"""Data sets with a name that lie on this machine: $DHBE_DATA, or ~/.cache/dhbe."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from dhbe.data.folders import Split, class_names, load_folder, own_splits
from dhbe.data.images import Images, Shape
from dhbe.data.packs import load_pack
from dhbe.errors import Refused


def kept() -> Path:
    """The folder that holds data sets."""
    return Path(os.environ.get("DHBE_DATA") or Path.home() / ".cache" / "dhbe")


def local_parts(name: str) -> dict[str, list[Path]] | None:
    """Where the parts of a named data set lie: paths by `train` and `test`, or by `all` if it has no own split.

    Looked for are, in this order, NAME_train*.npz with NAME_test*.npz, NAME.npz, and the image folder NAME; each name
    also without hyphens. None if there are none.
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


def load_parts(parts: dict[str, list[Path]], split: Split, shape: Shape | None, middle: int | None = None) -> Images:
    """The images of one part, or of all.

    Raises:
        Refused: A file is broken, or the parts differ in image size or classes.
    """
    wanted = [path for part, paths in parts.items() if split in ("all", part) for path in paths]
    folders = [path for paths in parts.values() for path in paths if path.is_dir()]
    if len({class_names(path) for path in folders}) > 1:  # or one part would number them differently
        raise Refused(f"{folders[0]} and {folders[1]} differ in their classes: both need all of them")
    read = [
        load_folder(path, shape, middle=middle) if path.is_dir() else load_pack(path, shape, middle=middle)
        for path in wanted
    ]
    if len({each.shape for each in read}) > 1:
        raise Refused(f"{wanted[0]} and {wanted[-1]} differ in their image sizes: resize, or give --input CxHxW")
    names = max((each.names for each in read), key=len)
    if len(read) == 1:
        return replace(read[0], names=names)
    return Images(torch.cat([each.pixels for each in read]), torch.cat([each.labels for each in read]), names)
