"""Tables 1 and 2 of the paper on CIFAR-10: how far triggers move images, and how far apart classes lie.

`python benchmarks/distances.py` writes results/distances/cifar10.json; CIFAR-10 is read from $DHBE_DATA or downloaded.
"""

import json
import time
from itertools import combinations
from pathlib import Path

import torch

from dhbe import diagnostics, files
from dhbe.attacks.triggers import parse
from dhbe.data import Images, load

OUT = Path(__file__).resolve().parents[1] / "results" / "distances" / "cifar10.json"
DRAWS, PROJECTIONS = 12, 500
TRIGGERS = (
    "pixel", "badnets:3", "badnets:5", "badnets:7", "badnets:3:white", "scattered:16", "blend:0.1", "blend:0.2", "sig:20",
    "sig:40", "lsb:1", "lsb:2", "faint:8", "refool:focus", "refool:ghost", "warp:0.5",
)  # fmt: skip
CHUNK = 100  # directions at a time
REPORTED = {"closest": ["cat", "dog", 282.76], "mean": 869.83}
"""Table 2."""


def classes(images: Images) -> dict[str, float]:
    """The distance of every pair of classes, `a-b` by their names (see docs/method.md)."""
    generator, pairs = torch.Generator().manual_seed(0), list(combinations(range(images.classes), 2))
    members = [images.float(images.labels == label).flatten(1) for label in range(images.classes)]
    dimensions, totals = members[0].shape[1], torch.zeros(len(pairs))
    for _ in range(DRAWS):
        largest = torch.zeros(len(pairs))
        for _ in range(PROJECTIONS // CHUNK):
            lines = diagnostics.directions(CHUNK, dimensions, generator)
            seen = [diagnostics.shadows(points, lines) for points in members]
            largest = largest.maximum(torch.stack([diagnostics.wasserstein(seen[a], seen[b]).max() for a, b in pairs]))
        totals += dimensions * largest / DRAWS
    return {f"{images.names[a]}-{images.names[b]}": float(total) for (a, b), total in zip(pairs, totals, strict=True)}


def main() -> None:
    """Measures and writes."""
    began = time.monotonic()
    pairs = classes(load("cifar10", "train"))
    closest = min(pairs, key=lambda pair: pairs[pair])
    test = load("cifar10", "test").float(slice(1000))
    content = {
        "what": "distances in L1 mass, pixels in [0, 1]",
        "classes": {
            "images": "all 5000 training images of each class",
            "definition": "3072 x the largest 1-Wasserstein distance along random directions, mean over draws",
            "projections": PROJECTIONS, "draws": DRAWS,
            "closest": [*closest.split("-"), pairs[closest]], "mean": sum(pairs.values()) / len(pairs),
            "reported": REPORTED, "pairs": pairs,
        },
        "triggers": {
            "images": "1000 test images",
            "distances": {name: diagnostics.trigger_distance(parse(name, (3, 32, 32)), test) for name in TRIGGERS},
        },
        "seconds": time.monotonic() - began,
    }  # fmt: skip
    OUT.parent.mkdir(parents=True, exist_ok=True)
    files.write(OUT, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
