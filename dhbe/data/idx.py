"""Fashion-MNIST (and MNIST) as published: gzipped IDX files, which consist of a header and bytes."""

import gzip
from pathlib import Path

import torch
from torch import Tensor

from dhbe import files
from dhbe.data.download import fetched
from dhbe.data.images import Images
from dhbe.errors import Refused

NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
STEMS = {"train": "train", "test": "t10k"}
SOURCE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
"""SHA-256 of Fashion-MNIST's files. Existing files in the folder may be MNIST's and are not compared."""


def holds_idx(folder: Path) -> bool:
    """Whether the folder holds any of the four files."""
    return any((folder / file).is_file() for file in SHA256)


def load_idx(folder: Path, split: str) -> Images:
    """The official train or test images, or both, as grey images of 28 px; missing files are downloaded.

    Raises:
        Failed: A file cannot be downloaded.
        Refused: A file is broken or not of this format.
    """
    for file, digest in SHA256.items():
        if not (folder / file).exists():
            fetched(SOURCE + file, digest, folder)
    stems = [STEMS[split]] if split in STEMS else list(STEMS.values())
    pixels, labels = zip(*(map(_read, _files(folder, stem), ((28, 28), ())) for stem in stems), strict=True)
    return Images(torch.cat(pixels)[:, None], torch.cat(labels).long(), NAMES)


def _files(folder: Path, stem: str) -> tuple[Path, Path]:
    return folder / f"{stem}-images-idx3-ubyte.gz", folder / f"{stem}-labels-idx1-ubyte.gz"


def _read(path: Path, each: tuple[int, ...]) -> Tensor:
    """The bytes of an IDX file, uint8 [n, *each]; at most 60,000 entries are read, whatever it declares."""
    size = 1
    for side in each:
        size *= side
    try:
        with files.opened(path) as file, gzip.open(file) as stream:
            head = stream.read(8 + 4 * len(each))
            count = int.from_bytes(head[4:8], "big")
            sides = tuple(int.from_bytes(head[at : at + 4], "big") for at in range(8, len(head), 4))
            body = stream.read(min(count, 60_000) * size + 1)
    except (OSError, EOFError, ValueError) as error:
        raise Refused(f"{path} is broken: download it again") from error
    if head[:4] != bytes((0, 0, 8, 1 + len(each))) or sides != each or not count or len(body) != count * size:
        raise Refused(f"{path} is not an IDX file of bytes [n, {', '.join(map(str, each))}]: download it again")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(count, *each)
