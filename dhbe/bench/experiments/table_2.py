"""Table 2: how far apart classes lie."""

from dhbe.bench import Case, Experiment, Grid, Scale
from dhbe.bench.paper import CLASSES

COSTS = {"smoke": (10, 1), "small": (500, 12), "paper": (500, 12)}
"""Directions and draws at each scale."""


def cases(scale: Scale) -> list[Case]:
    """One for each data set."""
    directions, draws = COSTS[scale.name]
    told = {"images": scale.images, "directions": directions, "draws": draws}
    return [
        Case(
            work="classes", settings={**told, "data": data}, name=f"classes-of-{data}", labels={"data": data}, minutes=5
        )
        for data in (scale.data, *(other for other in scale.others if other == "cifar100" and scale.name == "paper"))
    ]


EXPERIMENT = Experiment(
    title="Table 2: how far apart classes lie",
    cases=cases,
    draw=[
        Grid(rows=("data",), values=("closest", "mean"), paper=CLASSES, title="Sliced Wasserstein distances, L1 mass.")
    ],
    note="Dimensions x the largest distance along random directions: docs/attacks.md tells why the largest.",
)
