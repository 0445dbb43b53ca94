"""Erases the victims of `zoo/`, third-party ones where they are at hand, and the demo's, with the default settings.

    dhbe bench run experiments/erasures.py --scale small
    dhbe bench run experiments/erasures.py --scale small --only victim=argd seed=0

CIFAR-10 is read from $DHBE_DATA or downloaded; at the scale small 2000 of its test images measure, at paper all.
"""

import tempfile
from pathlib import Path

from dhbe import api, cli, data, records
from dhbe.bench import Case, Experiment, Grid, Scale, called
from dhbe.errors import Failed
from experiments import victims
from experiments.victims import DATA, SHARED, THIRD_PARTY, ZOO


def cases(scale: Scale) -> list[Case]:
    """Each victim at hand with each seed; none at the scale smoke."""
    named = ["demo", *(THIRD_PARTY if SHARED.exists() else ()), *ZOO] if scale.name != "smoke" else []
    return [
        called(
            "erased", "experiments/erasures.py", name=f"erasure-of-{victim}-seed-{seed}", minutes=4, victim=victim, seed=seed,
            tested=scale.tested or 10_000, labels={"victim": victim, "seed": seed},
        )
        for seed in scale.seeds
        for victim in named
    ]  # fmt: skip


def erased(victim: str, seed: int, tested: int) -> records.Record:
    """The record of one run, measured on so many test images."""
    if victim == "demo":
        return demo(seed)
    suspect, evidence = victims.load(victim, data.load(DATA, "test").subset(slice(tested)))
    return victims.without_paths(api.erase(suspect, evidence=evidence, seed=seed).record)


def demo(seed: int) -> records.Record:
    """The record of what `dhbe demo --seed N` erases."""
    with tempfile.TemporaryDirectory() as folder:
        if code := cli.main(["demo", "--seed", str(seed), "--out", folder, "--quiet"]):
            raise Failed(f"it ended with exit code {code}")
        return records.read(Path(folder) / "record.json")


EXPERIMENT = Experiment(
    title="Erasures of the zoo and of third-party models",
    cases=cases,
    draw=[Grid(rows=("victim",), values=("acc", "lost", "asr", "asr_x9", "seconds"))],
)
