"""Small classifiers of our own, half of them backdoored, on which `dhbe scan` is calibrated and judged.

    python benchmarks/calibration.py train DIR      # 32 classifiers; those that DIR holds are left alone

CIFAR-10 is read from $DHBE_DATA or downloaded. Networks, data, attacks, target classes and seeds all vary.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dhbe import api
from dhbe.attacks import Attack, BadNets
from dhbe.attacks.blend import Blend
from dhbe.attacks.lsb import LSB
from dhbe.attacks.none import NoAttack
from dhbe.attacks.sig import SIG
from dhbe.attacks.trojaning import Trojaning
from dhbe.data import Images, clean_subset, load
from dhbe.errors import Failed
from dhbe.training import Fit

HERE = Path(__file__).parent
ARCHS = {
    "resnet8": "resnet8", "wrn16-1": "wrn16-1", **{name: f"{HERE / 'strangers.py'}:{name}" for name in ("flat", "plain", "layered")}
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


def main(verb: str, folder: Path) -> None:
    """Trains what is missing."""
    sets = {data: (load(data, "train"), load(data, "test")) for data in FITS}
    for plan in PLANS:
        if not (folder / plan.name / "record.json").exists():
            try:
                train(plan, folder, *sets[plan.data])
            except Failed as failure:
                print(f"{plan.name}: {failure}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
