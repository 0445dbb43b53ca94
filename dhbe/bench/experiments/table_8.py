"""Table 8: other architectures."""

from dhbe.bench import Case, Experiment, Grid, Scale
from dhbe.bench.paper import ARCHS


def cases(scale: Scale) -> list[Case]:
    """DHBE on a BadNets victim of each architecture."""
    found = []
    for arch in scale.archs:
        victim = scale.victim("badnets", scale.sizes[0], arch=arch)
        found.append(victim.labelled(network=arch, defense="none"))
        found += [scale.by(victim, "dhbe", seed=seed, network=arch) for seed in scale.seeds]
    return found


EXPERIMENT = Experiment(
    title="Table 8: other architectures",
    cases=cases,
    draw=[Grid(rows=("network",), columns="defense", values=("acc", "asr"), paper=ARCHS)],
)
