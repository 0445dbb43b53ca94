"""Table 7: other target classes."""

from dhbe.bench import Case, Experiment, Grid, Scale
from dhbe.bench.paper import TARGETS


def cases(scale: Scale) -> list[Case]:
    """DHBE on a BadNets victim of each target class."""
    found = []
    for target in scale.targets:
        victim = scale.victim("badnets", scale.sizes[0], target=target)
        found.append(victim.labelled(target=target, defense="none"))
        found += [scale.by(victim, "dhbe", seed=seed, target=target) for seed in scale.seeds]
    return found


EXPERIMENT = Experiment(
    title="Table 7: other target classes",
    cases=cases,
    draw=[Grid(rows=("target",), columns="defense", values=("acc", "asr"), paper=TARGETS, mean=True)],
)
