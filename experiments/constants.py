"""Whether BatchNorm statistics identify unknown normalisation constants.

    python -m experiments.constants    # results/constants/named.json

On the models of `zoo/`, on third-party ones where their folder is at hand, and on ResNet-8s trained here on digits of 16 px
with each way of normalising. Untrained networks are tried too: they should be seen not to answer.
"""

import json
from pathlib import Path

import torch

from dhbe import claims, files, networks, suspects
from dhbe.bench import pages
from dhbe.classifier import Classifier
from dhbe.data import Images, load
from dhbe.evaluation.doubts import USUAL
from dhbe.training import Fit
from experiments import victims

OUT = Path(__file__).resolve().parents[1] / "results" / "constants" / "named.json"
HEADS = ("model", "normalised by", "named", "distance", "next", "0 / 1", "answers differ")
UNTRAINED = (("resnet8", 32), ("wrn16-1", 16), ("resnet20", 16), ("resnet18", 32))


def row(name: str, model: Classifier) -> dict:
    """Distances of one model's BatchNorm statistics for candidate constants, and the variety of its logits."""
    tried = claims.fits(model)
    right = tuple(tuple(each.flatten().tolist()) for each in (model.mean, model.std))
    wide = {option: tuple(tuple(x) * (3 // len(x)) for x in each) for option, each in USUAL.items()}
    said = next((o for o in claims.CANDIDATES if torch.allclose(torch.tensor(wide[o]), torch.tensor(right))), None)
    raw = Classifier(model.network, shape=model.shape, classes=model.classes).eval()
    against = claims.contradiction(raw)
    return {
        "model": name, "right": said, "distances": {fit.option: round(fit.distance, 4) for fit in tried},
        "left_out": against[0].option if against else None, "variety": round(claims.variety(model), 3),
    }  # fmt: skip


def digits(option: str, train: Images) -> Classifier:
    """A ResNet-8 trained on digits with this normalisation."""
    mean, std = USUAL[option]
    torch.manual_seed(0)
    model = Classifier(networks.build("resnet8", 10, train.shape), shape=train.shape, classes=10, mean=mean, std=std)
    return Fit(epochs=4, batch=32, crop=0, flip=False)(model, train)


def measure() -> None:
    """All of them, into one file."""
    blank = Images(torch.zeros(10, *victims.SHAPE, dtype=torch.uint8), torch.arange(10), tuple("0123456789"))
    known = [*victims.ZOO, *(victims.THIRD_PARTY if victims.SHARED.exists() else ())]
    rows = [row(name, victims.load(name, blank)[0].classifier) for name in known]
    train = load("digits16", "train")
    rows += [row(f"digits, {option}", digits(option, train)) for option in claims.CANDIDATES]
    untrained = {}
    for seed, (arch, side) in enumerate(UNTRAINED):
        torch.manual_seed(seed)
        network = networks.build(arch, 10, (3, side, side)).eval()
        untrained[arch] = round(claims.variety(suspects.of(network, (3, side, side)).classifier), 3)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    files.write(OUT, json.dumps({"models": rows, "untrained": untrained}, indent=1) + "\n")


def table() -> str:
    """A row for each model; wrong identifications are marked."""
    rows = []
    for each in json.loads(OUT.read_text())["models"]:
        right = (each["right"] or "—").replace("--mean=", "").replace(" --std=", " / ")
        told = sorted(each["distances"].items(), key=lambda pair: pair[1])
        if not told:
            rows.append((each["model"], right, "cannot tell: no BatchNorm", "—", "—", "—", f"{each['variety']:.2f}"))
            continue
        (best, nearest), (_, second) = told[:2]
        named = best.replace("--mean=", "").replace(" --std=", " / ")
        raw = each["distances"]["--mean=0 --std=1"]
        rows.append(
            (each["model"], right, named if named == right else f"**{named}**", f"{nearest:.2f}", f"{second:.2f}", f"{raw:.2f}", f"{each['variety']:.2f}")
        )  # fmt: skip
    return pages.table(HEADS, rows)


def tables() -> dict[str, str]:
    """What docs/models.md shows, by the name of its mark."""
    return {"experiments/constants.py": table()}


if __name__ == "__main__":
    measure()
