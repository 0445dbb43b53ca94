"""Tables 1 and 2 of the paper on CIFAR-10: how far triggers move images, and how far apart classes lie.

`python -m experiments.distances` writes results/distances/cifar10.json; CIFAR-10 is read from $DHBE_DATA or downloaded.
"""

import json
import time
from itertools import combinations
from pathlib import Path

import torch

from dhbe import files
from dhbe.attacks.triggers import parse
from dhbe.data import Images, load
from dhbe.evaluation import diagnostics

OUT = Path(__file__).resolve().parents[1] / "results" / "distances" / "cifar10.json"
DRAWS, PROJECTIONS = 12, 500
COUNTS, FEW_IMAGES, FEW_DRAWS = (100, 200, 500, 1000), 1000, 4
"""How the figures depend on the number of directions is seen on fewer images."""
TRIGGERS = (
    "pixel", "badnets:3", "badnets:5", "badnets:7", "badnets:3:white", "scattered:16", "blend:0.1", "blend:0.2", "sig:20",
    "sig:40", "lsb:1", "lsb:2", "faint:8", "refool:focus", "refool:ghost", "warp:0.5",
)  # fmt: skip
CHUNK = 100  # directions at a time
REPORTED = {"closest": ["cat", "dog", 282.76], "mean": 869.83}
"""Table 2."""


def classes(images: Images) -> dict[str, float]:
    """The distance of every pair of classes, `a-b` by their names (see docs/attacks.md)."""
    return named(images, seen(images, (PROJECTIONS,), DRAWS)[0][0])


def growth(images: Images) -> list[dict]:
    """The closest pair and the mean of all pairs, for the largest distance along so many directions; and for the mean.

    The mean over directions, the usual definition, takes all of them.
    """
    few = torch.cat([(images.labels == label).nonzero()[:FEW_IMAGES, 0] for label in range(images.classes)])
    largest, means = seen(images.subset(few), COUNTS, FEW_DRAWS)
    rows = [("largest", count, each) for count, each in zip(COUNTS, largest, strict=True)]
    found = []
    for what, count, distances in [*rows, ("mean", COUNTS[-1], means)]:
        pairs = named(images, distances)
        closest = min(pairs, key=lambda pair: pairs[pair])
        mean = sum(pairs.values()) / len(pairs)
        found.append({"of directions": what, "projections": count, "closest": closest, "cat-dog": pairs["cat-dog"],
                      "mean": mean})  # fmt: skip
    return found


def seen(images: Images, counts: tuple[int, ...], draws: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Distances of all pairs of classes, mean over draws.

    Returns:
        The largest along the first of the directions, [pairs] for each of the (rising) counts; and the mean of all.
    """
    generator, pairs = torch.Generator().manual_seed(0), list(combinations(range(images.classes), 2))
    members = [images.float(images.labels == label).flatten(1) for label in range(images.classes)]
    dimensions = members[0].shape[1]
    largest, means = [torch.zeros(len(pairs)) for _ in counts], torch.zeros(len(pairs))
    for _ in range(draws):
        top = torch.zeros(len(pairs))
        for start in range(0, counts[-1], CHUNK):
            lines = diagnostics.directions(CHUNK, dimensions, generator)
            shadows = [diagnostics.shadows(points, lines) for points in members]
            along = torch.stack([diagnostics.wasserstein(shadows[a], shadows[b]) for a, b in pairs])
            top = top.maximum(along.max(1).values)
            means += dimensions * along.sum(1) / (draws * counts[-1])
            if start + CHUNK in counts:
                largest[counts.index(start + CHUNK)] += dimensions * top / draws
    return largest, means


def named(images: Images, distances: torch.Tensor) -> dict[str, float]:
    """Distances of pairs of classes by their names."""
    pairs = combinations(images.names, 2)
    return {f"{a}-{b}": float(distance) for (a, b), distance in zip(pairs, distances, strict=True)}


def main() -> None:
    """Measures and writes."""
    began = time.monotonic()
    train = load("cifar10", "train")
    pairs = classes(train)
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
        "by_directions": {
            "images": f"{FEW_IMAGES} training images of each class", "draws": FEW_DRAWS, "rows": growth(train),
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
