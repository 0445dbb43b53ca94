"""CIFAR-10 and CIFAR-100 in their binary version, which contains no pickles."""

import tarfile
from dataclasses import dataclass

import torch
from torch import Tensor

from dhbe.data.download import fetched
from dhbe.data.images import Images
from dhbe.data.local import kept

SOURCE = "https://www.cs.toronto.edu/~kriz/"
SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Archive:
    """One of the two archives and its members."""

    file: str
    sha256: str
    """SHA-256 of the archive whose MD5 the authors publish."""
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    """Member with the class names, one per line."""
    label_bytes: int
    """Bytes before the pixels of an image; the last of them is its class."""


ARCHIVES = {
    "cifar10": Archive(
        "cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)),
        ("cifar-10-batches-bin/test_batch.bin",),
        "cifar-10-batches-bin/batches.meta.txt",
        label_bytes=1,
    ),
    "cifar100": Archive(
        "cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ("cifar-100-binary/train.bin",),
        ("cifar-100-binary/test.bin",),
        "cifar-100-binary/fine_label_names.txt",
        label_bytes=2,
    ),
}


def load_cifar(name: str, split: str) -> Images:
    """The official train or test images of `cifar10` or `cifar100`, or both, downloaded once.

    The archive is kept in $DHBE_DATA, or the user's cache.

    Raises:
        Failed: It cannot be downloaded.
        Refused: It is not the archive that the authors published.
    """
    archive = ARCHIVES[name]
    path = fetched(SOURCE + archive.file, archive.sha256, kept())
    members = {"train": archive.train, "test": archive.test}.get(split, archive.train + archive.test)
    with tarfile.open(path) as tar:
        records = torch.cat([_records(_member(tar, name), archive.label_bytes) for name in members])
        names = tuple(_member(tar, archive.names).decode().split())
    labels = records[:, archive.label_bytes - 1].long()
    return Images(records[:, archive.label_bytes :].reshape(-1, *SHAPE).contiguous(), labels, names)


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    assert stream is not None  # the checksum vouches for the members
    return stream.read()


def _records(data: bytes, label_bytes: int) -> Tensor:
    channels, height, width = SHAPE
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, label_bytes + channels * height * width)
