"""Table 2: distances of classes, also by the number of directions."""

from dhbe.bench import SMOKE, Case, Experiment, Grid, Scale
from dhbe.bench.paper import CLASSES

DIRECTIONS, DRAWS = 500, 12
COUNTS, FEW, FEW_DRAWS = (100, 200, 1000), 10_000, 4
"""Numbers for the dependence on the number of directions, which is measured on fewer images."""


def cases(scale: Scale) -> list[Case]:
    """One case for each data set, and some with other numbers of directions on the first."""
    if scale is SMOKE:
        return [one(scale.data, scale.images, 10, 1)]
    several = [one(scale.data, FEW, count, FEW_DRAWS) for count in COUNTS]
    return [one(data, None, DIRECTIONS, DRAWS) for data in ("cifar10", "cifar100")] + several


def one(data: str, images: int | None, directions: int, draws: int) -> Case:
    """The distances in one data set, over a number of its training images."""
    told = {"data": data, "images": images, "directions": directions, "draws": draws}
    labels = {"data": data, "images": images or "all", "directions": directions}
    return Case(work="classes", settings=told, name=f"classes-of-{data}", labels=labels, minutes=5)


EXPERIMENT = Experiment(
    title="Table 2: how far apart classes lie",
    cases=cases,
    draw=[
        Grid(
            rows=("data", "images", "directions"), values=("closest", "mean"), title="Sliced Wasserstein distances, L1 mass.",
            paper={(*data, "all", DIRECTIONS): figures for data, figures in CLASSES.items()},
        )
    ],
    note="Dimensions x the largest distance along random directions: docs/attacks.md tells why the largest.",
)  # fmt: skip
