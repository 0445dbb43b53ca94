"""Reads untrusted NumPy .npz files: headers are checked before anything is allocated, and pickles are never opened."""

import io
import math
import os
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dhbe import files, foreign
from dhbe.data.folders import MOST_CLASSES, Seen, decode
from dhbe.data.images import LIMIT, Images, Shape, check_size
from dhbe.errors import Refused

UNPACKED, GROWTH = 256 * 2**20, 4
"""Bytes to which any file may unpack, and the factor to its own size for larger ones; photographs hardly compress."""


PAIRS = (
    ("x_test", "y_test"),
    ("X_test", "y_test"),
    ("test_images", "test_labels"),
    ("x", "y"),
    ("X", "y"),
    ("data", "labels"),
)
"""Names of the arrays with images and labels in files of other libraries."""


def read_pack(
    path: Path, keys: Sequence[str], optional: Sequence[str] = (), limit: int = LIMIT
) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file, read-only.

    Args:
        path: The file.
        keys: Arrays that must be there.
        optional: Arrays that may be there. All others are left unread.
        limit: Maximum size of all arrays in bytes.

    Raises:
        Refused: The file is not a complete .npz, lacks an array, holds objects (pickles) or declares more than `limit`.
    """
    try:
        with files.opened(path) as file, zipfile.ZipFile(file) as archive:
            limit = min(limit, max(UNPACKED, GROWTH * os.fstat(file.fileno()).st_size))
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            if missing := [key for key in keys if key not in members]:
                if pair := next((pair for pair in PAIRS if set(pair) <= members.keys()), None):
                    renamed = ", ".join(f"{key}=old['{name}']" for key, name in zip(keys, pair, strict=True))
                    raise Refused(
                        f"{foreign.name(path)} lacks {' and '.join(missing)}, but holds {' and '.join(pair)}: "
                        f"old = numpy.load('{foreign.name(path)}'); numpy.savez('test.npz', {renamed})"
                    )
                found = ", ".join(repr(name) for name in list(members)[:8]) or "nothing"
                raise Refused(f"{foreign.name(path)} lacks {' and '.join(missing)}; it holds {found}")
            arrays = {}
            for key in (*keys, *(key for key in optional if key in members)):
                arrays[key] = _read_array(archive, members[key], f"{path}: {key}", limit)
                limit -= arrays[key].nbytes
            return arrays
    except Refused:
        raise
    except Exception as error:  # broken files may raise anything, from lzma.LZMAError to tokenize.TokenError
        raise Refused(
            f"{foreign.name(path)} is not a complete .npz file ({foreign.name(' '.join(str(error).split()), 80)}): write it again"
        ) from error


def _read_array(archive: zipfile.ZipFile, member: str, source: str, limit: int) -> np.ndarray:
    if archive.getinfo(member).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refused(
            f"{source} has a compression that numpy never uses: save it with numpy.savez"
        )  # LZMA may need 4 GiB
    with archive.open(member) as stream:
        # Version 1.0 holds every plain array, in a header of at most 64 KiB; the header of 2.0 may declare 4 GiB.
        if np.lib.format.read_magic(stream) != (1, 0):
            raise Refused(f"{source} is not a plain array: save numbers with numpy.savez")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.hasobject:
            raise Refused(f"{source} holds Python objects, which could run code: save numbers with numpy.savez")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size > limit:
            raise Refused(
                f"{source} declares {dtype} {list(shape)}, over the limit of {limit / 2**30:.3g} GiB for a file of this "
                "size: save less, or without compression (numpy.savez)"
            )
        data = stream.read(size)
        if len(data) < size or stream.read(1):  # reading past the end also verifies the checksum
            raise Refused(f"{source} does not hold the {dtype} {list(shape)} that its header declares")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def load_pack(path: Path, shape: Shape | None = None, limit: int = LIMIT, middle: int | None = None) -> Images:
    """Loads images from an .npz file with `images` uint8 [n, h, w, c] (or [n, c, h, w]; or [n, h, w], grey) and `labels`.

    Labels are whole numbers [n] or [n, 1], or rows [n, classes] of zeros with a one.

    Or with encoded images: `data` uint8 [bytes] holds consecutive files (PNG, JPEG, WebP, ...), number i from `offsets[i]`
    to `offsets[i + 1]`, with their `labels` [n] and optionally the class `names` [classes]. If there is a `strip`, each file
    holds square images one below the other.

    Without names, the number of classes is the largest label plus one.

    Args:
        path: The file.
        shape: Shape (c, h, w) to which encoded images are converted; None keeps theirs, which must be the same for all.
        limit: Maximum size of all arrays in bytes.
        middle: Side in pixels of the central square to which larger encoded images are cropped first.

    Raises:
        Refused: The file or an array in it is not as described.
    """
    if _encoded(path):
        return _load_encoded(path, shape, limit, middle)
    arrays = read_pack(path, ("images", "labels"), limit=limit)
    pixels, labels = arrays["images"], arrays["labels"]
    if pixels.dtype != np.uint8:
        raise Refused(f"{path}: images are {pixels.dtype}, not uint8 in 0..255: {_as_uint8(pixels)}")
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    elif pixels.ndim == 4 and pixels.shape[1] in (1, 3) and pixels.shape[-1] not in (1, 3):
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or pixels.size == 0:
        raise Refused(f"{path}: images must be [n, h, w, c] with 1 or 3 channels c, not {list(arrays['images'].shape)}")
    planes = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    numbers = _labels(path, labels, len(planes))
    return Images(planes, numbers, tuple(str(number) for number in range(int(numbers.max()) + 1)))


def _as_uint8(pixels: np.ndarray) -> str:
    """How to convert pixels of another type."""
    low, high = (
        (float(pixels.min()), float(pixels.max())) if pixels.size and pixels.dtype.kind in "fiu" else (-1.0, -1.0)
    )
    if low < 0 or not high <= 255:
        return "save them before any normalisation"
    scaled = "(255 * images)" if pixels.dtype.kind == "f" and high <= 1 else "images"
    return f"save {scaled}.round().astype('uint8')"


def _labels(path: Path, labels: np.ndarray, count: int) -> Tensor:
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    elif labels.ndim == 2 and labels.dtype.kind in "fiub" and ((labels == 0) | (labels == 1)).all():
        if not (labels.sum(1) == 1).all():
            raise Refused(
                f"{path}: labels must name one class per image, and some of these rows do not have just one 1"
            )
        labels = labels.argmax(1)
    if labels.dtype.kind == "f" and (labels == labels.round()).all() and (abs(labels) < MOST_CLASSES).all():
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise Refused(f"{path}: labels must be integers [{count}], one per image, not {found}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MOST_CLASSES:
        raise Refused(
            f"{path}: labels go from {low} to {high}; they must be class numbers from 0 to {MOST_CLASSES - 1}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _encoded(path: Path) -> bool:
    try:
        with files.opened(path) as file, zipfile.ZipFile(file) as archive:
            found = {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception:  # `read_pack` reports the error
        return False
    return {"data", "offsets", "labels"} <= found and "images" not in found


def _load_encoded(path: Path, shape: Shape | None, limit: int, middle: int | None) -> Images:
    arrays = read_pack(path, ("data", "offsets", "labels"), ("names", "strip"), limit=limit)
    data, offsets = arrays["data"], arrays["offsets"]
    if data.dtype != np.uint8 or data.ndim != 1 or offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        raise Refused(f"{path}: data must be uint8 [bytes] and offsets integers [files + 1]")
    if len(offsets) < 2 or offsets[0] < 0 or offsets[-1] > len(data) or (np.diff(offsets.astype(np.int64)) <= 0).any():
        raise Refused(f"{path}: offsets must rise from 0 to at most {len(data)}, the length of the data")
    parts: list[Tensor] = []
    seen = Seen()
    for number, (start, stop) in enumerate(pairwise(offsets)):
        name = f"{path}: image file {number}"
        if "strip" in arrays:
            tiles = _tiles(decode(io.BytesIO(data[start:stop].tobytes()), name), name)
        else:
            tiles = decode(io.BytesIO(data[start:stop].tobytes()), name, shape, middle, seen)[None]
        if parts and tiles.shape[1:] != parts[0].shape[1:]:
            raise Refused(f"{path}: mixed sizes: resize, or give --input=CxHxW")
        parts.append(tiles)
        check_size(sum(map(len, parts)), (tiles.shape[1], tiles.shape[2], tiles.shape[3]), path, limit)
    pixels = torch.cat(parts)
    labels = _labels(path, arrays["labels"], len(pixels))
    names = _class_names(path, arrays.get("names"), int(labels.max()) + 1)
    return Images(pixels, labels, names, seen.notes(len(pixels), shape or (0, 0, 0)))


def _tiles(strip: Tensor, name: str) -> Tensor:
    channels, height, width = strip.shape
    if height % width:
        raise Refused(f"{name} is {width} x {height}: a strip holds square images one below the other")
    return strip.view(channels, -1, width, width).transpose(0, 1).contiguous()


def _class_names(path: Path, names: np.ndarray | None, least: int) -> tuple[str, ...]:
    if names is None:
        return tuple(str(number) for number in range(least))
    if names.dtype.kind != "U" or names.ndim != 1 or not least <= len(names) <= MOST_CLASSES:
        raise Refused(f"{path}: names must be texts, one per class, for the labels up to {least - 1}")
    return tuple(foreign.name(str(name)) for name in names)
