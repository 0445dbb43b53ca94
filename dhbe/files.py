"""Files that are there whole or not at all."""

import hashlib
import io
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dhbe.errors import Failed, Refused
from dhbe.foreign import name

LEAST_FULL = 100
"""A large file of which the disk holds less than one byte in so many is full of holes. Weights that a file system
compresses keep more than half of their size."""

LARGE = 2**30
"""Bytes from which on holes in a file matter."""


def opened(path: Path, most: int | None = None, *, follow: bool = True) -> io.BufferedReader:
    """A regular file, open for reading.

    Args:
        path: The file. Whatever else is there is not waited for, as a pipe would have it, and not read.
        most: Bytes that it may have.
        follow: Whether a link to a regular file is followed.

    Raises:
        Refused: It cannot be read, is a folder, a pipe or a device, is larger than `most`, or consists of holes.
    """
    try:
        fault = _fault(path.stat(follow_symlinks=follow), most)  # before it is opened: some devices act when they are
        if not fault:
            return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        fault = _reason(error)
    except ValueError:  # a zero byte in the name
        fault = "impossible name"
    raise Refused(f"cannot read {name(path)}: {fault}")


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
        sync_folder(path.parent)
    except OSError as error:
        raise Failed(f"cannot write {name(path)}: {_reason(error)}") from error


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Tries to hold a lock file, and tells whether this process does; the kernel lets go of it whatever happens to us.

    Args:
        path: The file; its folder must exist. It is made, and may be removed by who holds it. A link is not followed.

    Raises:
        OSError: It cannot be opened.
    """
    lock = FileLock(path, mode=0o644, fallback_to_soft=False)  # a soft lock would stay behind if we were killed
    with suppress(Timeout):
        lock.acquire(blocking=False)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits.

    Raises:
        Refused: The file cannot be read.
    """
    with opened(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Refused(f"cannot read {name(path)}: {_reason(error)}") from error


def _fault(status: os.stat_result, most: int | None) -> str | None:
    """What keeps a file from being read, if anything does; some file systems do not say what they store."""
    size, stored = status.st_size, 512 * status.st_blocks
    if stat.S_ISDIR(status.st_mode):
        return "it is a folder"
    if not stat.S_ISREG(status.st_mode):
        return "it is no regular file"
    if most is not None and size > most:
        return f"it has {size:,} bytes, over the limit of {most:,}"
    if size >= LARGE and 0 < stored < size // LEAST_FULL:
        return f"it declares {size:,} bytes and holds {stored:,}: it consists of holes"
    return None


def sync_folder(folder: Path) -> None:
    """Waits until what a folder lists is on the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
