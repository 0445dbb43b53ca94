"""Downloads files once from their publishers."""

from pathlib import Path

import pooch
from requests import ConnectionError, Timeout

from dhbe.errors import Failed, Refused
from dhbe.files import sha256

PATIENCE = 60
"""Timeout in seconds without a response."""


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
    pooch.get_logger().setLevel("WARNING")  # errors are reported by our own messages
    downloader = pooch.HTTPDownloader(timeout=PATIENCE)
    try:
        pooch.retrieve(address, digest, path.name, path.parent, downloader=downloader)  # pyright: ignore[reportArgumentType]
    except (OSError, ValueError) as error:
        raise Failed(f"cannot download {address}: {_reason(error)}; download it yourself into {path.parent}") from error


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, ConnectionError | Timeout):
        return "no connection"
    return str(error) if isinstance(error, OSError) else "the file there has changed"
