"""What the parts of `fast` buy, and whether the signs that need no data rank what comes of it.

    python -m experiments.sweep run      # results/sweep/VICTIM_VARIANT.json; what is there is left alone
    python -m experiments.sweep run trojaning-5
    python -m experiments.sweep tables   # of docs/method.md

Victims are one of `zoo/` and a network that flattens its features, which `calibration.py` trains into `runs/` first.
CIFAR-10 is read from $DHBE_DATA or downloaded; 3000 test images measure.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from scipy.stats import spearmanr

from dhbe import api, data, records, settings, suspects
from dhbe.api import machine
from dhbe.attacks.triggers import parse
from dhbe.defenses import PRESETS
from dhbe.records import Record
from dhbe.search import families
from dhbe.search.families import FAMILIES, Patches
from dhbe.search.image_pool import ImagePool
from dhbe.search.survey import Findings, Survey
from dhbe.search.trigger_bank import TriggerBank
from dhbe.suspects import Suspect
from experiments import calibration, missing, pages, victims

RESULTS, WORK = victims.ROOT / "results" / "sweep", victims.ROOT / "runs" / "sweep"
FLAT = calibration.Plan("white4", "flat", "cifar10", 17)
VICTIMS = ("trojaning-5", FLAT.name)
TESTED = 3000
Change = tuple[Any, str, Any]


@dataclass(frozen=True)
class Variant:
    """Settings that differ from the default ones, and parts that are taken out: owner, name, what stands in for it."""

    settings: dict[str, float] = field(default_factory=dict)
    without: tuple[Change, ...] = ()


def nothing(*args: object, **more: object) -> None:
    """Stands in for a part that only has an effect."""


def replaced(owner: type, name: str, stand_in: Callable[..., Any]) -> Change:
    """A method that is called with the one whose place it takes."""
    own = getattr(owner, name)
    return owner, name, lambda *args, **more: stand_in(own, *args, **more)


def all_alike(tried: Callable[..., torch.Tensor], self: TriggerBank, *args: object) -> torch.Tensor:
    """All triggers are shown as often, whether they act or not."""
    return torch.ones_like(self.gain)


PATCHES = torch.tensor([kind is Patches for kind in FAMILIES])[:, None]


def patches_stand_out(outliers: Callable[..., torch.Tensor], self: Survey, anomaly: torch.Tensor) -> torch.Tensor:
    """Only patches at random places are known, as in the paper."""
    return outliers(self, anomaly) & PATCHES


PARTS = {
    "all of it": Variant(),
    "no class singled out, all light": Variant({"anomaly_threshold": 1e9}),
    "every class restricted in full": Variant(
        without=(replaced(Survey, "outliers", lambda own, self, anomaly: torch.ones_like(anomaly, dtype=torch.bool)),)
    ),
    "no search before the student moves": Variant(without=((Survey, "step", lambda *args: {}),)),
    "patches only": Variant(
        {"families_at_once": 0},
        without=(
            replaced(Survey, "outliers", patches_stand_out),
            (Findings, "sought", property(lambda self: (self.outliers if self.backdoored else PATCHES) & PATCHES)),
        ),
    ),
    "no compact squares": Variant(without=((families.Masked, "compact", False),)),
    "no search in the student": Variant({"families_at_once": 0}),
    "what is remembered is not retried": Variant(without=(replaced(TriggerBank, "tried", all_alike),)),
    "never several at once": Variant({"room": 0.0}),
    "images not filtered": Variant(without=((ImagePool, "filter", nothing),)),
    "images not evenly by class": Variant(
        without=(replaced(ImagePool, "sample", lambda own, self, count, evenly=False: own(self, count)),)
    ),
    "photographs alone": Variant(without=((ImagePool, "renew", nothing),)),
    "gradient without a bound": Variant({"clip": 1e30}),
}  # fmt: skip
"""What each part buys, by taking it out."""


@cache
def loaded(victim: str) -> tuple[Suspect, api.Evidence]:
    """A victim and what it is measured with."""
    test = data.load(victims.DATA, "test").subset(slice(TESTED))
    if victim != FLAT.name:
        return victims.load(victim, test)
    folder = WORK / FLAT.name
    if not (folder / "record.json").exists():
        calibration.train(FLAT, WORK, data.load(victims.DATA, "train"), test)
    suspect = suspects.load(folder / api.BACKDOORED, arch=calibration.ARCHS[FLAT.arch])
    trigger = parse(str(folder / "trigger.json"), suspect.info.input)
    return suspect, api.Evidence(test, victims.DATA, trigger, records.read(folder / "record.json").target)


def run(victim: str, variant: Variant) -> Record:
    """The record of one run."""
    suspect, evidence = loaded(victim)
    with ExitStack() as stack:
        for owner, name, stand_in in variant.without:
            stack.enter_context(patch.object(owner, name, stand_in))
        defense = settings.changed(PRESETS["fast"], variant.settings)
        return api.erase(suspect, defense=defense, evidence=evidence).record


def path(victim: str, name: str) -> Path:
    """Where a record lies."""
    return RESULTS / f"{victim}_{name.replace(' ', '-').replace(',', '')}.json"


def run_all(wanted: list[str]) -> None:
    """Runs what has no record yet, on all victims or on those that are named."""
    both = product(wanted or VICTIMS, PARTS.items())
    missing.run(((path(victim, name).stem, partial(run, victim, part)) for victim, (name, part) in both), RESULTS)


@dataclass(frozen=True)
class Outcome:
    """One run, in points of a hundred."""

    lost: float
    asr: float
    x9: float | None
    agreement: float
    gain: float

    @classmethod
    def of(cls, path: Path) -> "Outcome":
        record = records.read(path)
        before, after = record.before, record.after
        assert before is not None
        assert after is not None
        return cls(
            100 * ((before.acc or 0) - (after.acc or 0)), 100 * (after.asr or 0), after.asr_x9 and 100 * after.asr_x9,
            after.signs["agreement"], before.signs["gain"],
        )  # fmt: skip


def found(victim: str) -> dict[str, Outcome]:
    """The runs on a victim that there are."""
    return {name: Outcome.of(path(victim, name)) for name in PARTS if path(victim, name).exists()}


def parts() -> str:
    """A row for each part that is taken out."""
    ran = [found(victim) for victim in VICTIMS]
    rows = []
    for name in PARTS:
        cells = [name]
        for runs in ran:
            each = runs.get(name)
            cells += [f"{each.lost:.1f}", f"{each.asr:.1f}", f"{each.x9 or 0:.1f}"] if each else ["failed", "—", "—"]
        rows.append(cells)
    return pages.table(
        ("taken out", *(f"{head}{of}" for of in (", trojaning-5", ", flat") for head in ("ACC lost", "ASR %", "x9 %"))), rows
    )  # fmt: skip


def signs() -> str:
    """How the signs of finished runs rank them, beside what data shows."""
    rows = []
    for victim in VICTIMS:
        runs = list(found(victim).values())
        ranks = [
            spearmanr([each.agreement for each in runs], [-each.lost for each in runs]).statistic,
            spearmanr([each.gain for each in runs], [each.asr for each in runs]).statistic,
        ]
        rows.append([victim, str(len(runs)), *(f"{rank:.2f}" for rank in ranks)])
    return pages.table(("victim", "runs", "agreement and ACC", "gain and ASR"), rows)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        machine.keep_memory()
        run_all(sys.argv[2:])
    else:
        pages.tell("docs/method.md", {"experiments/sweep.py parts": parts(), "experiments/sweep.py signs": signs()})
