"""Small classifiers of our own, half of them backdoored, on which `dhbe scan` is calibrated and judged.

    python -m experiments.calibration train DIR      # 32 classifiers; those that DIR holds are left alone
    python -m experiments.calibration scan DIR       # their records, in results/calibration; those there are left alone
    python -m experiments.calibration table          # AUROC and hits on one half, threshold and curve from the other

CIFAR-10 is read from $DHBE_DATA or downloaded. Networks, data, attacks, target classes and seeds all vary. A victim whose
ASR is below a half has no backdoor to find, and is left out.
"""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from dhbe import api, records, suspects
from dhbe.attacks import Attack, BadNets
from dhbe.attacks.blend import Blend
from dhbe.attacks.lsb import LSB
from dhbe.attacks.none import NoAttack
from dhbe.attacks.sig import SIG
from dhbe.attacks.trojaning import Trojaning
from dhbe.data import Images, clean_subset, load
from dhbe.errors import Failed
from dhbe.training import Fit
from experiments import missing, pages, victims
from experiments.victims import SHARED, THIRD_PARTY

HERE = Path(__file__).resolve().parent
HEADS = ("classifier", "half", "index", "class found", "target")
RESULTS = HERE.parent / "results" / "calibration"
ARCHS = {
    "resnet8": "resnet8", "wrn16-1": "wrn16-1", **{name: f"{HERE / 'third_party.py'}:{name}" for name in ("flat", "plain", "layered")}
}  # fmt: skip
FITS = {
    "digits": Fit(epochs=12, batch=32, lr=0.05, crop=0, flip=False),
    "cifar10": Fit(epochs=6, batch=64, lr=0.05, crop=0, flip=False),
}
AUGMENTED = Fit(epochs=6, batch=64, lr=0.05)
"""With crops and flips, in which few epochs plant no small patch in a network that pools."""

IMAGES = 8000
"""Of CIFAR-10 that one classifier is trained on."""


@dataclass(frozen=True)
class Plan:
    """One classifier of the set."""

    attack: str
    arch: str
    data: str
    seed: int
    augmented: bool = False

    @property
    def name(self) -> str:
        return f"{self.attack}_{self.arch}_{self.data}_{self.seed}"

    @property
    def how(self) -> Attack:
        """The attack, at a target class that goes by the seed."""
        target = 3 * self.seed % 10
        return {
            "clean": NoAttack(),
            "checkerboard3": BadNets(target=target, side=3, rate=0.1),
            "random5": BadNets(target=target, side=5, style="random", place="10,12", rate=0.1),
            "white4": BadNets(target=target, side=4, style="white", place="top-left", rate=0.1),
            "blend": Blend(target=target, alpha=0.2, rate=0.1),
            "sig": SIG(target=target, delta=40, share=0.5),
            "trojaning5": Trojaning(target=target, side=5, steps=200, tune_epochs=4),
            "lsb": LSB(target=target, bits=3, rate=0.1),
        }[self.attack]


PLANS = [
    *(Plan("clean", arch, "digits", 0) for arch in ARCHS),
    *(Plan("clean", arch, "cifar10", 1, augmented=True) for arch in ARCHS),
    *(Plan("clean", arch, "digits", 2) for arch in ("resnet8", "flat", "plain")),
    *(Plan("checkerboard3", arch, "cifar10", 11, augmented=arch == "flat") for arch in ARCHS),
    *(Plan("clean", arch, "cifar10", 3) for arch in ("resnet8", "flat", "plain")),
    Plan("random5", "resnet8", "digits", 12), Plan("random5", "wrn16-1", "cifar10", 13), Plan("random5", "plain", "cifar10", 14),
    Plan("white4", "flat", "digits", 15), Plan("white4", "layered", "cifar10", 16), Plan("white4", "flat", "cifar10", 17),
    Plan("blend", "resnet8", "cifar10", 18), Plan("blend", "flat", "digits", 19),
    Plan("sig", "resnet8", "cifar10", 21), Plan("trojaning5", "wrn16-1", "digits", 22), Plan("lsb", "resnet8", "cifar10", 23),
    Plan("checkerboard3", "resnet8", "digits", 24),
]  # fmt: skip


def train(plan: Plan, folder: Path, train: Images, test: Images) -> None:
    """One classifier, into a folder of its name."""
    part = clean_subset(train, IMAGES, plan.seed) if len(train) > IMAGES else train
    began = time.monotonic()
    record = api.attack(
        plan.how, part, test, arch=ARCHS[plan.arch], out=folder / plan.name, data=plan.data, fit=AUGMENTED if plan.augmented else FITS[plan.data],
        seed=plan.seed, force=True, overwrite=True,
    )  # fmt: skip
    assert record.before is not None
    acc, asr = record.before.acc, record.before.asr
    asr = "" if asr is None else f", ASR {asr:.3f}"
    print(f"{plan.name}: ACC {acc:.3f}{asr}, {time.monotonic() - began:.0f} s", flush=True)


def train_all(folder: Path) -> None:
    """Trains what is missing."""
    sets = {data: (load(data, "train"), load(data, "test")) for data in FITS}
    for plan in PLANS:
        if not (folder / plan.name / "record.json").exists():
            try:
                train(plan, folder, *sets[plan.data])
            except Failed as failure:
                print(f"{plan.name}: {failure}", file=sys.stderr)


def scan_all(folder: Path) -> None:
    """Scans what has no record yet."""
    made = [plan for plan in PLANS if (folder / plan.name / "record.json").exists()]
    missing.run(((plan.name, partial(scanned, plan, folder)) for plan in made), RESULTS)
    others = THIRD_PARTY if SHARED.exists() else ()
    missing.run(((f"{name}_third-party_0", partial(third_party, name)) for name in others), RESULTS)


def scanned(plan: Plan, folder: Path) -> records.Record:
    """A scan of one classifier. The record keeps how it was planted and how well the trigger works."""
    planted = records.read(folder / plan.name / "record.json")
    model = folder / plan.name / (api.BACKDOORED if (folder / plan.name / api.BACKDOORED).exists() else api.CLEAN)
    record = api.scan(suspects.load(model, arch=ARCHS[plan.arch])).record
    told = {"path": model.name, "arch": plan.arch, "code": None}
    return record.model_copy(
        update={
            "model": record.model.model_copy(update=told), "attack": planted.attack, "data": planted.data,
            "target": planted.target, "after": planted.before and planted.before.model_copy(update={"activations": {}}),
        }
    )  # fmt: skip


def third_party(name: str) -> records.Record:
    """A scan of a third-party model."""
    suspect, evidence = victims.load(name, load("cifar10", "test").subset(slice(1)))
    return api.scan(suspect).record.model_copy(update={"data": "cifar10", "target": evidence.target})


@dataclass(frozen=True)
class Seen:
    """One classifier of the set, as it was scanned."""

    name: str
    index: float
    suspect: int
    target: int | None

    @classmethod
    def of(cls, path: Path) -> "Seen | None":
        """From its record; None for a victim whose backdoor did not take."""
        record = records.read(path)
        assert record.before is not None
        if record.after is not None and record.after.asr is not None and record.after.asr < 0.5:
            return None
        signs = record.before.signs
        return cls(path.stem, signs["anomaly_index"], int(signs["suspected_class"]), record.target)


def seen(folder: Path) -> tuple[list[Seen], list[Seen]]:
    """The two halves: of the sorted names of each kind every other one fits, the rest judge."""
    found = [each for path in sorted(folder.glob("*.json")) if (each := Seen.of(path))]
    sides = [[each for each in found if (each.target is not None) == planted] for planted in (False, True)]
    fitting, judging = ([each for side in sides for each in side[first::2]] for first in (0, 1))
    return fitting, judging


def table(folder: Path) -> str:
    """Every classifier, and what one half says of the threshold that the other half gave."""
    fitting, judging = seen(folder)
    threshold, (middle, slope) = best_threshold(fitting), curve(fitting)
    truth, indices = [each.target is not None for each in judging], [each.index for each in judging]
    accused = [each for each in judging if each.index > threshold]
    hits = [each for each in accused if each.target is not None]
    right = sum(each.suspect == each.target for each in hits)
    rows = []
    for each in sorted([*fitting, *judging], key=lambda each: -each.index):
        half, target = "judged" if each in judging else "fitted", "none" if each.target is None else str(each.target)
        rows.append((each.name.replace("_", " "), half, f"{each.index:.1f}", str(each.suspect), target))
    return "\n".join(
        [
            f"Of one half ({len(fitting)} classifiers): threshold {threshold:.1f}, even odds at {middle:.1f}, slope {slope:.1f}.",
            f"Of the other ({len(judging)}): AUROC {roc_auc_score(truth, indices):.2f}; "
            f"{len(hits)} of {sum(truth)} backdoored ones found, the right class in {right} of them; "
            f"{len(accused) - len(hits)} of {len(judging) - sum(truth)} clean ones accused.",
            "",
            pages.table(HEADS, rows),
        ]
    )


def best_threshold(half: list[Seen]) -> float:
    """The index at which hits less false alarms are most, as shares: the middle of the gap there."""
    levels = sorted(each.index for each in half)
    planted = sum(each.target is not None for each in half)

    def gain(level: float) -> float:
        over = [each.target is not None for each in half if each.index > level]
        return sum(over) / planted - (len(over) - sum(over)) / (len(half) - planted)

    return max(((low + high) / 2 for low, high in pairwise(levels)), key=gain)


def curve(half: list[Seen]) -> tuple[float, float]:
    """Middle and slope of the logistic curve in the logarithm of the index, both kinds weighing the same."""
    x = [[math.log(max(each.index, 0.1))] for each in half]
    fit = LogisticRegression(class_weight="balanced").fit(x, [each.target is not None for each in half])
    slope, offset = float(fit.coef_[0, 0]), float(fit.intercept_[0])
    return math.exp(-offset / slope), slope


if __name__ == "__main__":
    if sys.argv[1] == "table":
        pages.tell("docs/method.md", {"experiments/calibration.py": table(RESULTS)})
    else:
        {"train": train_all, "scan": scan_all}[sys.argv[1]](Path(sys.argv[2]))
