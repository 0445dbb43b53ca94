"""Trains the victims of this folder: `python zoo/build.py [NAME ...]`; those whose record is here are left alone.

With --force a victim that missed what its attack expects is kept all the same, and its record says what was missed.
CIFAR-10 is read from $DHBE_DATA or downloaded. Each victim is NAME.safetensors (weights, and how to read them, in its
header), NAME.trigger.json and NAME.json (the record: attack, settings, seed, ACC and ASR on all test images).
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dhbe import api, files, records, suspects
from dhbe.attacks import Attack, BadNets
from dhbe.attacks.blend import Blend
from dhbe.attacks.clean_label import CleanLabel
from dhbe.attacks.lsb import LSB
from dhbe.attacks.none import NoAttack
from dhbe.attacks.refool import Refool
from dhbe.attacks.sig import SIG
from dhbe.attacks.trojaning import Trojaning
from dhbe.attacks.wanet import WaNet
from dhbe.data import Images, load
from dhbe.errors import Failed
from dhbe.progress import Progress
from dhbe.training import Fit

ZOO = Path(__file__).parent
ARCH, DATA = "resnet8", "cifar10"
CLEAN, SCRATCH = "clean", Fit(epochs=6, lr=0.2)
TUNING, PLAIN = Fit(epochs=2, lr=0.1), Fit(epochs=2, lr=0.1, crop=0, flip=False)
"""The clean model is trained from scratch; victims are fine-tuned from it, to be trained on a laptop. What is hard to learn
is planted in images that are neither cropped nor mirrored: so few steps teach one pattern, not all its forms."""

VICTIMS: dict[str, tuple[Attack, Fit]] = {
    CLEAN: (NoAttack(), SCRATCH),
    "badnets-3": (BadNets(side=3, rate=0.05), TUNING),
    "blend": (Blend(alpha=0.2, rate=0.3), PLAIN),
    "badnets-5": (BadNets(side=5, rate=0.05), TUNING),
    "trojaning-5": (Trojaning(side=5, steps=500, tune_epochs=2), TUNING),
    "sig": (SIG(delta=40, share=0.5), TUNING),
    "clean-label-5": (CleanLabel(side=5, rate=0.04, steps=20, proxy_epochs=1, proxy_steps=1), PLAIN),
    "badnets-7": (BadNets(side=7, rate=0.05), TUNING),
    "lsb": (LSB(bits=4, text="?", rate=0.1), PLAIN),
    "refool": (Refool(style="ghost", transmission=0.4, share=0.8), PLAIN),
    "wanet": (WaNet(strength=2.0, rate=0.2, noise_rate=0.1), PLAIN),
    "clean-label-7": (CleanLabel(side=7, rate=0.04, steps=20, proxy_epochs=1, proxy_steps=1), PLAIN),
    "clean-label-3": (CleanLabel(side=3, rate=0.04, steps=20, proxy_epochs=1, proxy_steps=1), PLAIN),
}
"""What is planted and how it is trained, by name. Trainings are far shorter than the paper's, so more images are
poisoned. A text of one letter makes a regular pattern of bits, which is learned soonest."""


@dataclass(frozen=True)
class CIFAR10:
    """The data, read once."""

    train: Images
    test: Images


def build(name: str, data: CIFAR10, force: bool) -> records.Record:
    """Trains one victim and puts its three files here; the record, which tells that it is whole, last."""
    clean = suspects.load(ZOO / f"{CLEAN}.safetensors") if name != CLEAN else None
    how, fit = VICTIMS[name]
    epochs = sum(each.epochs for each, _ in how.trainings(fit, clean=clean is not None))
    with tempfile.TemporaryDirectory() as folder, Progress(epochs, name, quiet=False) as progress:
        out = Path(folder) / name
        record = api.attack(
            how, data.train, data.test, arch=ARCH, out=out, data=DATA, fit=fit, clean=clean, fine_tune=clean is not None,
            force=force, watch=progress.epoch,
        )  # fmt: skip
        files.write(ZOO / f"{name}.safetensors", (out / how.weights).read_bytes())
        if record.trigger:
            files.write(ZOO / f"{name}.trigger.json", (out / api.TRIGGER).read_text())
        made = record.model.model_copy(update={"path": f"{name}.safetensors"})
        records.write(ZOO / f"{name}.json", record.model_copy(update={"model": made}))
    return records.read(ZOO / f"{name}.json")


def main(names: list[str], force: bool) -> int:
    """Builds what is named, or all; tells how many attacks missed what they expect."""
    wanted = [name for name in names or VICTIMS if not (ZOO / f"{name}.json").exists()]
    failed = 0
    if wanted:
        data = CIFAR10(load(DATA, "train"), load(DATA, "test"))
    for name in wanted:
        try:
            before = build(name, data, force).before
        except Failed as failure:
            failed += 1
            print(f"{name}: {failure}", file=sys.stderr)
        else:
            print(f"{name}: ACC {before.acc:.4f}, ASR {'none' if before.asr is None else f'{before.asr:.4f}'}")
    return failed


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main([name for name in given if name != "--force"], "--force" in given))
