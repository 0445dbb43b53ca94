"""The file with the saved state of an interrupted run, preceded by a checksum.

A single bit flipped on the disk would end up in the weights, and a folder may come from elsewhere. So nothing in the file is
used before its checksum is verified, and the state is then read as restrictively as untrusted checkpoints.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dhbe import files, pickles
from dhbe.errors import Refused, said
from dhbe.foreign import name

MAGIC = b"dhbe state 1\n"

LARGEST = 64 * 2**30
"""Maximum size of a state in bytes, more than any run needs."""

_HEAD = len(MAGIC) + 65


def write(path: Path, settings: str, state: Mapping[str, Any]) -> None:
    """Writes the state of a run atomically.

    Args:
        path: The file.
        settings: Everything that the result depends on, a JSON object.
        state: Plain containers, numbers, texts and tensors.

    Raises:
        Failed: It cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"settings": settings, **state}, buffer)
    files.write(path, signed(buffer.getbuffer()))


def signed(content: bytes | memoryview) -> bytes:
    """The output of `torch.save`, preceded by its checksum."""
    return b"".join([MAGIC, hashlib.sha256(content).hexdigest().encode(), b"\n", content])


def read(path: Path) -> dict[str, Any]:
    """Reads a state written by `write`; a symbolic link is not followed.

    Raises:
        Refused: The file is not such a state, or its content was changed.
    """
    try:
        with files.opened(path, LARGEST, follow=False) as file:
            head = file.read(_HEAD)
            if not head.startswith(MAGIC):
                raise ValueError("it was written by another version, or is not a state")
            content = file.read()
        if MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" != head:
            raise ValueError("its checksum is wrong")
        stream = io.BytesIO(content)
        pickles.check_zip(stream, len(content))
        stream.seek(0)
        saved = torch.load(stream, map_location="cpu", weights_only=True)
        if not isinstance(json.loads(saved["settings"]), dict):
            raise ValueError("it has no settings")
    except Exception as error:  # parsers of corrupt files may raise anything
        raise unusable(path, error) from error
    return saved


def unusable(path: Path, why: object) -> Refused:
    """The exception for a state from which a run cannot resume."""
    reason = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why
    if isinstance(why, ValueError):
        reason = why
    return Refused(f"cannot resume from {name(path)} ({said(reason)[:200]}): add --overwrite to start over")
