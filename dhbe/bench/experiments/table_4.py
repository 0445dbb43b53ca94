"""Table 4: other data sets."""

from itertools import product

from dhbe.bench import Case, Experiment, Grid, Scale
from dhbe.bench.paper import DATA

DEFENSES = ("finetuning", "nad", "neural-cleanse", "gdm", "dhbe")


def cases(scale: Scale) -> list[Case]:
    """Every defence on a BadNets victim of each data set, two sizes each."""
    found = []
    for data, size in product(scale.others, scale.sizes[: 1 if scale.name == "smoke" else 2]):
        victim = scale.victim("badnets", size, data=data)
        found.append(victim.labelled(data=data, size=size, defense="none"))
        found += [
            scale.by(victim, defense, seed=seed, data=data, size=size)
            for defense, seed in product(DEFENSES, scale.seeds)
        ]
    return found


EXPERIMENT = Experiment(
    title="Table 4: more data sets",
    cases=cases,
    draw=[Grid(rows=("data", "size"), columns="defense", values=("acc", "asr"), paper=DATA)],
    note="Mini-ImageNet and VGGFace2 are read from $DHBE_DATA; nobody may hand them on.",
)
