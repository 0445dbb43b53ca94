"""Reads mutated inputs, each in a process with limits, and tells what became of them.

    python -m tests.fuzz --cases 20000 --seed 7 --keep found

The exit code is 1 if any input was executed, ended in a traceback or a crash, hung, or took too much memory.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from dhbe.errors import Failed, Refused
from tests.fuzz import cases

SECONDS = 10
"""Of a processor, for one input."""

PATIENCE = 60
"""Seconds on the clock; a process that waits for a pipe uses no processor."""

MEMORY = 2**30
"""Bytes that a process may take, or four times the file."""

CEILING = 4 * 2**30
"""Bytes of addresses beyond those at the start, so that the machine outlives an input that asks for all."""

READ, REFUSED, TRACEBACK = 0, 10, 20
FINE = ("read", "refused")


@dataclass
class Child:
    """A process that reads one input."""

    number: int
    folder: Path
    size: int
    began: float
    hung: bool = False


def obey(case: cases.Case, folder: Path) -> None:
    """The body of a child."""
    os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT), 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + CEILING,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    forbidden = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}

    def watch(event: str, details: tuple) -> None:
        if event in forbidden:
            (folder / "canary").touch()

    sys.addaudithook(watch)
    code = READ
    try:
        case.read(folder / case.name)
    except (Refused, Failed) as error:
        code = REFUSED
        print(error, file=sys.stderr)
    except BaseException:
        code = TRACEBACK
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def begin(seed: int, number: int, place: Path) -> tuple[int, Child]:
    folder = place / str(number)
    folder.mkdir()
    case = cases.case(seed, number, str(folder / "canary"))
    (folder / case.name).write_bytes(case.content)
    pid = os.fork()
    if not pid:
        obey(case, folder)
    return pid, Child(number, folder, len(case.content), time.monotonic())


def outcome(child: Child, status: int, peak: int) -> str:
    """What became of an input."""
    code = os.waitstatus_to_exitcode(status)
    if (child.folder / "canary").exists():
        return "executed"
    if child.hung or code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "hung"
    if code < 0:
        return "crashed"
    said = (child.folder / "said").read_text(errors="replace")
    if peak > max(MEMORY, 4 * child.size) or "not enough memory" in said:
        return "took too much memory"
    return {READ: "read", REFUSED: "refused"}.get(code, "ended in a traceback")


def fuzz(count: int, seed: int, jobs: int, keep: Path | None) -> tuple[Counter, int]:
    """How many inputs came to what, and the largest peak in bytes."""
    found, largest, running = Counter(), 0, {}
    with tempfile.TemporaryDirectory() as folder:
        number = 0
        while number < count or running:
            while number < count and len(running) < jobs:
                pid, child = begin(seed, number, Path(folder))
                running[pid] = child
                number += 1
            pid, status, used = os.wait4(-1, os.WNOHANG)
            if not pid:
                for each, child in running.items():
                    if not child.hung and time.monotonic() - child.began > PATIENCE:
                        child.hung = True
                        os.kill(each, signal.SIGKILL)
                time.sleep(0.001)
                continue
            child, peak = running.pop(pid), 1024 * used.ru_maxrss
            came_to = outcome(child, status, peak)
            found[came_to] += 1
            largest = max(largest, peak)
            if came_to not in FINE:
                said = (child.folder / "said").read_text(errors="replace").strip().splitlines()
                print(f"case {child.number} {came_to}: {said[-1][:200] if said else ''}", file=sys.stderr, flush=True)
                if keep:
                    shutil.copytree(child.folder, keep / str(child.number), dirs_exist_ok=True)
            shutil.rmtree(child.folder)
    return found, largest


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Reads mutated inputs, in processes with limits."
    )
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that did harm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases.bombs()  # made before the processes are, so that none of them counts it
    found, largest = fuzz(args.cases, args.seed, args.jobs, args.keep)
    print(json.dumps({**dict(found.most_common()), "seed": args.seed, "peak_mib": largest >> 20}))
    return int(any(found[came_to] for came_to in found if came_to not in FINE))


if __name__ == "__main__":
    sys.exit(main())
