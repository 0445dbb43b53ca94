"""Draws docs/triggers.png, every trigger on the same images: `python docs/triggers.py`."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn.functional import interpolate

from dhbe.attacks.triggers import MAKERS, Trigger, parse

OUT = Path(__file__).with_suffix(".png")
SIDE = 64
SHOWN = (
    "badnets:7", "badnets:7:checkerboard2", "badnets:7:white:center", "badnets:7:random:top-left",
    "badnets:7:white:opacity=0.5", "badnets:5:copies=9", "pixel:center", "scattered:40", "faint:8", "blend:0.2", "sig:30",
    "lsb:4", "refool:focus", "refool:ghost", "warp:3",
)  # fmt: skip
"""At least one of each name; sizes for 64 px."""
STRONGER = 5
"""Times that differences are enlarged; grey is none."""


def photographs() -> Tensor:
    """Two photographs that scikit-learn ships, [2, 3, SIDE, SIDE] in [0, 1]."""
    images = []
    for name in ("china.jpg", "flower.jpg"):
        pixels = torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None, :, :427, 100:527].float() / 255
        images.append(interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)[0])
    return torch.stack(images)


def tile(trigger: Trigger, images: Tensor) -> Tensor:
    """Triggered images beside their differences, [SIDE, 4 SIDE, 3]."""
    triggered = trigger(images)
    difference = (0.5 + STRONGER * (triggered - images)).clamp(0, 1)
    return torch.cat([*triggered, *difference], dim=2).permute(1, 2, 0)


def main() -> None:
    """Draws the picture."""
    missing = set(MAKERS) - {name.split(":")[0] for name in SHOWN}
    assert not missing, f"not shown: {missing}"
    images = photographs()
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    for axes, name in zip(figure.subplots(5, 3).flat, SHOWN, strict=True):
        axes.imshow(tile(parse(name, (3, SIDE, SIDE)), images).numpy(), interpolation="nearest")
        axes.set_title(name, fontsize=9, family="monospace")
        axes.set_axis_off()
    figure.suptitle(
        f"Every trigger on the same two images, and the difference ({STRONGER} times, grey is none)", fontsize=10
    )
    figure.savefig(OUT, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
