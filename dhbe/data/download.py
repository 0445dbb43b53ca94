"""Downloads files once from their publishers."""

import contextlib
import os
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path

from dhbe.errors import Failed, Refused
from dhbe.files import sha256


def fetched(address: str, digest: str, folder: Path) -> Path:
    """The path of a published file in `folder`, where it is downloaded if missing.

    Args:
        address: URL of the file; its last part is the file's name.
        digest: SHA-256 of its content, hexadecimal.
        folder: Download folder, created if missing.

    Raises:
        Failed: It cannot be downloaded, or the file at the URL has changed.
        Refused: The existing file is not the published one.
    """
    path = folder / address.rpartition("/")[2]
    if not path.exists():
        _download(address, digest, path)
    elif sha256(path) != digest:
        raise Refused(f"{path} is not the file that {address} should be: delete it to have it downloaded again")
    return path


def _download(address: str, digest: str, path: Path) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # S310 warns of file: URLs; those here are constants.
        with urllib.request.urlopen(address, timeout=60) as answer, part.open("wb") as file:  # noqa: S310
            shutil.copyfileobj(answer, file)
        if sha256(part) != digest:
            raise OSError("another file is there now")
        part.replace(path)
    except (OSError, HTTPException) as error:
        raise Failed(f"cannot download {address}: {error}; put the file into {path.parent} yourself") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
