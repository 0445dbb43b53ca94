"""NumPy .npz files from strangers: headers are judged before anything is allocated, and no pickle is ever opened."""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dhbe.data.images import LIMIT, Images
from dhbe.errors import Refused

MOST_CLASSES = 100_000
"""More classes than this are taken for a mistake in the labels."""


def read_pack(
    path: Path, keys: Sequence[str], optional: Sequence[str] = (), limit: int = LIMIT
) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file, read-only.

    Args:
        path: The file.
        keys: Arrays that must be there.
        optional: Arrays that may be there. All others are left unread.
        limit: Bytes that the arrays may take together.

    Raises:
        Refused: The file is not a whole .npz, lacks an array, holds objects (pickles) or declares more than `limit`.
    """
    try:
        if not path.is_file():
            raise Refused(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            if missing := [key for key in keys if key not in members]:
                found = ", ".join(repr(name) for name in list(members)[:8]) or "nothing"
                raise Refused(f"{path} lacks {' and '.join(missing)}; it holds {found}")
            arrays = {}
            for key in (*keys, *(key for key in optional if key in members)):
                arrays[key] = _read_array(archive, members[key], f"{path}: {key}", limit)
                limit -= arrays[key].nbytes
            return arrays
    except Refused:
        raise
    except Exception as error:  # damage raises anything, from lzma.LZMAError to tokenize.TokenError
        raise Refused(
            f"{path} is not a whole .npz file ({' '.join(str(error).split())[:80]}): make it again"
        ) from error


def _read_array(archive: zipfile.ZipFile, member: str, source: str, limit: int) -> np.ndarray:
    with archive.open(member) as stream:
        # Version 1.0 holds every plain array, in a header of at most 64 KiB; the header of 2.0 may declare 4 GiB.
        if np.lib.format.read_magic(stream) != (1, 0):
            raise Refused(f"{source} is no plain array: save numbers with numpy.savez")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.hasobject:
            raise Refused(f"{source} holds Python objects, which could run code: save numbers with numpy.savez")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size > limit:
            raise Refused(f"{source} declares {dtype} {list(shape)}, over the limit of {limit / 2**30:.3g} GiB")
        data = stream.read(size)
        if len(data) < size or stream.read(1):  # reading past the end also checks the sum
            raise Refused(f"{source} does not hold the {dtype} {list(shape)} that its header declares")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def load_pack(path: Path, limit: int = LIMIT) -> Images:
    """Images from an .npz file with `images` uint8 [n, h, w, c] (or [n, h, w], grey) and `labels` [n].

    The number of classes is the largest label plus one.

    Args:
        path: The file.
        limit: Bytes that the arrays may take together.

    Raises:
        Refused: The file or an array in it is not as described.
    """
    arrays = read_pack(path, ("images", "labels"), limit=limit)
    pixels, labels = arrays["images"], arrays["labels"]
    if pixels.dtype != np.uint8:
        mend = "(255 * images).round().astype('uint8') if they lie in [0, 1]" if pixels.dtype.kind == "f" else "uint8"
        raise Refused(f"{path}: images are {pixels.dtype}, not uint8 in 0..255: save {mend}")
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or pixels.size == 0:
        raise Refused(f"{path}: images must be [n, h, w, c] with 1 or 3 channels c, not {list(arrays['images'].shape)}")
    if labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1]:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise Refused(f"{path}: labels must be integers [{len(pixels)}], one an image, not {found}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MOST_CLASSES:
        raise Refused(
            f"{path}: labels go from {low} to {high}; they must be class numbers from 0 to {MOST_CLASSES - 1}"
        )
    planes = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    names = tuple(str(number) for number in range(high + 1))
    return Images(planes, torch.from_numpy(labels.astype(np.int64)), names)
