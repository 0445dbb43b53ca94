"""The file that an interrupted run goes on from: its state, behind a checksum over all of it.

One bit that flipped on a disk would be taken over and end up in the weights, and a folder may come from elsewhere. So
nothing of the file is used before the checksum is right, and what is behind it is read as strangers' checkpoints are.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dhbe import checkpoint, files
from dhbe.errors import Refused
from dhbe.foreign import name

MAGIC = b"dhbe state 1\n"

LARGEST = 64 * 2**30
"""Bytes; more than any memory takes that a run fits into."""

_HEAD = len(MAGIC) + 65


def write(path: Path, settings: str, state: Mapping[str, Any]) -> None:
    """Writes the state of a run, whole or not at all.

    Args:
        path: The file.
        settings: All that the result depends on, a JSON object.
        state: Plain containers, numbers, texts and tensors.

    Raises:
        Failed: It cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"settings": settings, **state}, buffer)
    files.write(path, signed(buffer.getbuffer()))


def signed(content: bytes | memoryview) -> bytes:
    """What `torch.save` wrote, behind its checksum."""
    return b"".join([MAGIC, hashlib.sha256(content).hexdigest().encode(), b"\n", content])


def read(path: Path) -> dict[str, Any]:
    """The state that `write` wrote; a link is not followed.

    Raises:
        Refused: It is no such file, or a bit of it changed.
    """
    try:
        with files.opened(path, LARGEST, follow=False) as file:
            head = file.read(_HEAD)
            if not head.startswith(MAGIC):
                raise ValueError("it was written by another version, or is no state")
            content = file.read()
        if MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" != head:
            raise ValueError("its checksum is wrong")
        stream = io.BytesIO(content)
        checkpoint.check_zip(stream, len(content))
        stream.seek(0)
        saved = torch.load(stream, map_location="cpu", weights_only=True)
        if not isinstance(json.loads(saved["settings"]), dict):
            raise ValueError("it has no settings")
    except Exception as error:  # whatever is wrong with it
        raise unusable(path, error) from error
    return saved


def unusable(path: Path, why: object) -> Refused:
    """What is said of a state that a run cannot go on from."""
    reason = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why
    if isinstance(why, ValueError):
        reason = why
    return Refused(f"{name(path)} cannot be gone on with ({str(reason)[:200]}): add --overwrite to begin anew")
