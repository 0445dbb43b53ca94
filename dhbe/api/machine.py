"""The machine of a run: device, precision, versions, memory, time."""

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
"""Instruction sets with which a CPU multiplies faster in bf16 than in fp32."""

Precision = Literal["auto", "fp32", "bf16"]


def keep_memory() -> None:
    """Makes this process keep freed memory instead of returning it to the system page by page.

    Steps allocate the same large tensors repeatedly; without this, a tenth of their time is spent on page faults. Has no
    effect without glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((MMAP_THRESHOLD, 2**30), (TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(option, value)


def device(name: str) -> torch.device:
    """The device with a name; `auto` is CUDA if available, else the CPU.

    Raises:
        Refused: There is no such device, or it cannot compute.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()  # some devices, such as meta, cannot compute
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"no device {name!r} here ({str(error).splitlines()[0][:80]}): give --device=cpu") from error
    return found


def device_name(where: torch.device) -> str:
    """The device's name in records."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    if where.type != "cpu":
        return str(where)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def precision(asked: Precision, where: torch.device, *, exact: bool) -> Literal["fp32", "bf16"]:
    """Resolves `auto`: bf16 if the device supports it natively and the run need not follow a paper exactly, else fp32."""
    if asked != "auto":
        return asked
    if where.type == "cuda":
        with torch.cuda.device(where):
            quick = torch.cuda.is_bf16_supported(including_emulation=False)
    elif where.type == "cpu":  # one without such instructions emulates bf16, many times slower than fp32
        able = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older versions of torch
        quick = any(able.get(name, False) for name in MADE_FOR_BF16)
    else:
        quick = False  # nothing is known of it
    return "bf16" if quick and not exact else "fp32"


def forget_peak(where: torch.device) -> None:
    """Resets the counter of `peak_memory`; on a CPU this is not possible."""
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)


def peak_memory(where: torch.device) -> int:
    """Peak memory in bytes: on CUDA since `forget_peak`, else of the whole process since its start."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def versions() -> dict[str, str]:
    """Versions of Python, torch, the platform and this package, with its commit if it runs from a clone."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}
    if commit := _commit():
        found["commit"] = commit
    try:
        return {"dhbe": version("dhbe"), **found}
    except PackageNotFoundError:  # run from a source tree that is not installed
        return found


@cache
def _commit() -> str | None:
    """The commit of the clone that holds this file, followed by `+` if files were changed; None outside a clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(  # noqa: S603
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],  # noqa: S607
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):  # git is not installed, or refuses a folder of another owner
        return None
    return found.stdout.strip() or None


def now() -> str:
    """The current time, UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
