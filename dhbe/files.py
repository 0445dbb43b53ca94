"""Files that are there whole or not at all."""

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

from dhbe.errors import Failed, Refused


def write(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader, or a power cut, meets the old content or the new one, never a part.

    The content goes to a temporary file in the same folder, which then takes the place of `path`; a link at `path` is
    replaced, not followed. The new file has the mode that the umask gives to any new file.

    Args:
        path: The file; its folder must exist.
        content: Its bytes, or text that is written as UTF-8.

    Raises:
        Failed: The disk is full, the folder is missing or cannot be written. No temporary file stays behind.
    """
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            with beside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:  # an interruption too: the temporary goes in every case
            with suppress(OSError):
                beside.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise Failed(f"cannot write {path}: {_reason(error)}") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits.

    Raises:
        Refused: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"cannot read {path}: {_reason(error)}") from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
