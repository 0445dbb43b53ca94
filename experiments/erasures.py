"""Erases victims with the default settings and writes results/erasures/VICTIM_SEED.json; what is there is left alone.

CIFAR-10 is read from $DHBE_DATA or downloaded; all 10,000 test images measure. A victim `demo` is what `dhbe demo` makes.

    python -m experiments.erasures
    python -m experiments.erasures --victims argd blend --seeds 0
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from dhbe import api, cli, data, records
from dhbe.api import machine
from dhbe.errors import Failed
from experiments import missing
from experiments.victims import DATA, ROOT, SHARED, THIRD_PARTY, ZOO, load


def main() -> None:
    """Reads the options, and erases what has no record yet, a seed at a time."""
    every = ["demo", *(THIRD_PARTY if SHARED.exists() else ()), *ZOO]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--victims", nargs="+", default=every, choices=every, help="default: all at hand")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", type=Path, default=ROOT / "results/erasures", help="folder of the records")
    parser.add_argument("--tested", type=int, default=10_000, help="test images, the first ones (default: all)")
    args = parser.parse_args()
    missing.run(
        (
            (
                f"{victim}_{seed}",
                partial(demo, seed) if victim == "demo" else partial(erased, victim, seed, args.tested),
            )
            for seed in args.seeds
            for victim in args.victims
        ),
        args.out,
        brief=False,
    )


def erased(victim: str, seed: int, tested: int) -> records.Record:
    """The record of one run, measured on so many test images."""
    suspect, evidence = load(victim, data.load(DATA, "test").subset(slice(tested)))
    return api.erase(suspect, evidence=evidence, seed=seed).record


def demo(seed: int) -> records.Record:
    """The record of what `dhbe demo --seed N` erases."""
    with tempfile.TemporaryDirectory() as folder:
        if code := cli.main(["demo", "--seed", str(seed), "--out", folder, "--quiet"]):
            raise Failed(f"it ended with exit code {code}")
        return records.read(Path(folder) / "record.json")


if __name__ == "__main__":
    machine.keep_memory()
    main()
