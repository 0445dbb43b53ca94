"""Stops each verb with `kill -9` at random moments, and looks at what is left: `python -m tests.kills --kills 50`.

Each resumes to the very weights, or findings, of an uninterrupted run. A record is never there without the results that it belongs to, and the user's own files stay as they were.
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dhbe import networks, records, runs
from dhbe.cli import codes

TINY = "--device cpu --precision fp32 --quiet"
VERBS = {
    "erase": (f"erase model.pt --input 3x8x8 --iterations 8 --warm-up 4 --batch 8 --pool-size 16 --checkpoint-every 0 {TINY}",
              "clean.safetensors"),
    "defend": (f"defend finetuning model.pt --input 3x8x8 --data data.npz --clean data.npz --epochs 3 --batch 4 "
               f"--images 40 --checkpoint-every 0 {TINY}", "clean.safetensors"),
    "attack": ("attack badnets --data data.npz --arch resnet8 --epochs 3 --batch 8 --rate .1 --force --device cpu --quiet",
               "backdoored.safetensors"),
    "scan": (f"scan model.pt --input 3x8x8 --warm-up 4 --search-batch 8 --pool-size 16 --checkpoint-every 0 {TINY}", None),
    "verify": (f"verify model.pt other.pt --input 3x8x8 --warm-up 2 --search-batch 8 --pool-size 16 --checkpoint-every 0 {TINY}",
               None),
}  # fmt: skip
ENDED = (codes.DONE, codes.FOUND, codes.UNCLEAR)
"""Exit codes of a run that came to an end, whatever its verdict."""


def started(command: str, folder: Path) -> subprocess.Popen:
    code = "import sys, torch; torch.set_num_threads(1); from dhbe.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, *shlex.split(command)]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=folder, env=here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def result(out: Path, weights: str | None) -> object:
    """What a finished run came to, but for the time it took and the words that started it."""
    record = records.read(out / runs.RECORD).model_dump(
        exclude={"seconds", "finished", "memory", "versions", "command"}
    )
    return record, (out / weights).read_bytes() if weights else None


def inputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def prepare(folder: Path) -> None:
    torch.manual_seed(0)
    for name in ("model.pt", "other.pt"):
        torch.save(networks.build("resnet8", 3, (3, 8, 8)).state_dict(), folder / name)
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", images=rng.integers(0, 256, (60, 8, 8, 3), np.uint8), labels=np.arange(60) % 3)


def killed(verb: str, kills: int, folder: Path, moments: random.Random) -> dict[str, int]:
    """How often a verb was killed, and how often it was quicker; raises AssertionError with what is wrong."""
    command, weights = VERBS[verb]
    before, began = inputs(folder), time.monotonic()
    whole = started(f"{command} --out whole-{verb}", folder)
    assert whole.wait() in ENDED, whole.communicate()[1]
    seconds, expected = time.monotonic() - began, result(folder / f"whole-{verb}", weights)
    out, count = folder / f"killed-{verb}", {"killed": 0, "finished": 0}
    while count["killed"] < kills:
        run = started(f"{command} --out {out.name} --resume", folder)
        try:
            run.wait(moments.uniform(0, 1.1 * seconds))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
        code = run.wait()
        assert code in (*ENDED, -signal.SIGKILL), run.communicate()[1]
        count["killed" if code < 0 else "finished"] += 1
        if (out / runs.RECORD).exists():
            assert result(out, weights) == expected
            if code >= 0:
                out.rename(folder / f"done-{verb}-{count['finished']}")
    last = started(f"{command} --out {out.name} --resume", folder)
    assert last.wait() in ENDED, last.communicate()[1]
    assert result(out, weights) == expected
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp" or path.name == runs.STAGE.name]
    assert inputs(folder) == before
    return count


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description="Kills each verb at random moments.")
    parser.add_argument("--kills", type=int, default=50, help="of each verb")
    parser.add_argument("--verbs", nargs="+", choices=list(VERBS), default=list(VERBS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for verb in args.verbs:
            print(
                json.dumps({"verb": verb, **killed(verb, args.kills, Path(folder), random.Random(args.seed))}),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
