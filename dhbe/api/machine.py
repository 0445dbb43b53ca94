"""The machine that a run is on: device, precision, versions, memory, the hour."""

import ctypes
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from dhbe.errors import Refused

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt."""

MADE_FOR_BF16 = ("amx_bf16", "avx512_bf16")
"""Instructions with which a CPU multiplies in bf16 faster than in fp32."""

Precision = Literal["auto", "fp32", "bf16"]


def keep_memory() -> None:
    """Lets this process keep freed memory for the next step instead of handing it back to the system page by page.

    Steps allocate the same large tensors over and over; without this a tenth of their time goes into page faults. Only
    glibc knows how; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((MMAP_THRESHOLD, 2**30), (TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(option, value)


def device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one.

    Raises:
        Refused: There is no such device, or it computes nothing.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()  # some devices compute nothing
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"no device {name!r} here ({str(error).splitlines()[0][:80]}): give --device cpu") from error
    return found


def device_name(where: torch.device) -> str:
    """What a record calls the device."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def precision(asked: Precision, where: torch.device, *, exact: bool) -> Literal["fp32", "bf16"]:
    """`auto` is bf16 where the device is made for it, and fp32 elsewhere and wherever a paper is followed exactly."""
    if asked != "auto":
        return asked
    if where.type == "cuda":
        with torch.cuda.device(where):
            quick = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # a CPU without such instructions emulates bf16, many times slower than fp32
        able = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
        quick = any(able.get(name, False) for name in MADE_FOR_BF16)
    return "bf16" if quick and not exact else "fp32"


def forget_peak(where: torch.device) -> None:
    """Lets `peak_memory` count from now on, where that is possible."""
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)


def peak_memory(where: torch.device) -> int:
    """Bytes: of the device where it counts them, else of this process, with whatever else it has done."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def versions() -> dict[str, str]:
    """Versions of what computes, and of this package its commit, where it is run from a clone."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}
    if commit := _commit():
        found["commit"] = commit
    try:
        return {"dhbe": version("dhbe"), **found}
    except PackageNotFoundError:  # run from a source tree that is not installed
        return found


@cache
def _commit() -> str | None:
    """The commit of the clone that this file lies in, with a `+` where files were changed since; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(  # noqa: S603
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],  # noqa: S607
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):  # git is not there, or the folder is not its own
        return None
    return found.stdout.strip() or None


def now() -> str:
    """The hour, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
