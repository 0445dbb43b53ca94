"""The classifiers for experiments: those of `zoo/`, and third-party ones if their folder is available.

The folder of third-party models ($DHBE_SHARED, or `shared` beside the project) is not part of the project.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dhbe import api, records, suspects
from dhbe.attacks.triggers import Trigger, parse
from dhbe.attacks.triggers.makers import badnets
from dhbe.attacks.triggers.patch import Patch
from dhbe.data import Images
from dhbe.suspects import Suspect

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("DHBE_SHARED", ROOT.parent / "shared")) / "data" / "victims"
DATA, SHAPE = "cifar10", (3, 32, 32)
ZOO = tuple(sorted(path.stem for path in (ROOT / "zoo").glob("*.safetensors")))


def grid() -> Trigger:
    """A grey grid of 3 x 3 in the middle."""
    pattern, mask = torch.zeros(SHAPE), torch.zeros(SHAPE)
    rows = torch.tensor([[255, 128, 255], [128, 255, 128], [255, 128, 128]]) / 255
    pattern[:, 18:21, 18:21], mask[:, 18:21, 18:21] = rows, 1
    return Patch(pattern, mask, name="grid:3")


def faint() -> Trigger:
    """A faint pattern over the whole image, added."""
    pattern = np.load(SHARED / "ibau_triggers.npz")["ibau_l2_inv"]
    pixels = torch.from_numpy(pattern).permute(2, 0, 1).float() / 255
    return Patch(pixels.contiguous(), torch.ones(SHAPE), "add", "l2_inv")


def corner_grid() -> Trigger:
    """A grid of 3 x 3 in the lower right corner."""
    pattern, mask = torch.zeros(SHAPE), torch.zeros(SHAPE)
    rows = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]]) / 255
    pattern[:, 29:, 29:], mask[:, 29:, 29:] = rows, 1
    return Patch(pattern, mask, name="grid-corner:3")


def scattered() -> Trigger:
    """Nine scattered pixels, replaced."""
    told = np.load(SHARED / "ibau_triggers.npz")
    keep, pattern = (torch.from_numpy(told[name]).permute(2, 0, 1).float() for name in ("ibau_l0_keep", "ibau_l0_inv"))
    return Patch((pattern / 255).contiguous(), (1 - keep).contiguous(), name="l0_inv")


@dataclass(frozen=True)
class ThirdParty:
    """How a third-party model is loaded, and its trigger."""

    file: str
    net: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    trigger: Callable[[], Trigger | None]
    target: int | None


SMALL_VGG = ("small_vgg", (0.0,), (1.0,))
THIRD_PARTY = {
    "argd": ThirdParty("argd_wrn16_1_grid_center_t0.pt", "wrn16_1", (0.0,), (1.0,), grid, 0),
    "small-vgg-corner": ThirdParty(
        "ibau_cifar10_smallvgg_badnets_t8.pt", *SMALL_VGG, lambda: badnets(4, SHAPE, "white", (27, 27)), 8
    ),
    "small-vgg-faint": ThirdParty("ibau_cifar10_smallvgg_l2_inv_t0.pt", *SMALL_VGG, faint, 0),
    "abl": ThirdParty("abl_wrn16_1_grid_t0.pt", "wrn16_1", (0.0,), (1.0,), corner_grid, 0),
    "small-vgg-scattered": ThirdParty("ibau_cifar10_smallvgg_l0_inv_t0.pt", *SMALL_VGG, scattered, 0),
    "tiniest-clean": ThirdParty("tiniest_layernorm.pt", "tiniest", (0.5,), (1.0,), lambda: None, None),
    "badnet-cnn": ThirdParty(
        "verazuo_badnet_cifar10_white5_t1.pt", "badnet_cnn", (0.5,), (0.5,), lambda: badnets(5, SHAPE, "white"), 1
    ),
    "resnet20-clean": ThirdParty(
        "akamaster_resnet20.pt", "resnet20", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), lambda: None, None
    ),
}  # fmt: skip


def load(name: str, test: Images) -> tuple[Suspect, api.Evidence]:
    """A victim by name, and its evidence."""
    if name in THIRD_PARTY:
        how = THIRD_PARTY[name]
        suspect = suspects.load(
            SHARED / how.file, arch=f"{SHARED / 'nets.py'}:{how.net}", classes=10, input_shape=SHAPE,
            mean=how.mean, std=how.std,
        )  # fmt: skip
        return suspect, api.Evidence(test, DATA, how.trigger(), how.target)
    suspect, planted = suspects.load(ROOT / f"zoo/{name}.safetensors"), records.read(ROOT / f"zoo/{name}.json")
    file = ROOT / f"zoo/{name}.trigger.json"
    trigger = parse(str(file), suspect.info.input) if file.exists() else None
    return suspect, api.Evidence(test, DATA, trigger, planted.target)


def without_paths(record: records.Record) -> records.Record:
    """A record with file names instead of paths, which differ between machines."""
    model = record.model
    told = {
        "path": model.path and Path(model.path).name, "arch": Path(model.arch).name,
        "code": model.code and Path(model.code).name,
    }  # fmt: skip
    warnings = [warning.replace(f"{SHARED}/", "") for warning in record.warnings]
    return record.model_copy(update={"model": model.model_copy(update=told), "warnings": warnings})
