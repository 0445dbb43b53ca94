"""Figure 11: sizes of the trigger, and of the triggers that DHBE generates."""

from itertools import product

from dhbe.bench import Case, Experiment, Grid, Scale


def cases(scale: Scale) -> list[Case]:
    """DHBE with each size of generated triggers on a victim of each size."""
    found = []
    for side in scale.patches:
        victim = scale.victim("badnets", side)
        found.append(victim.labelled(size=side, generated="backdoored"))
        found += [
            scale.ours(victim, seed=seed, changes={"patch": patch}, size=side, generated=patch)
            for patch, seed in product(scale.patches, scale.seeds[:1])
        ]
    return found


EXPERIMENT = Experiment(
    title="Figure 11: sizes of triggers",
    cases=cases,
    draw=[Grid(rows=("size",), columns="generated", values=("acc", "asr"))],
    note="The paper finds all sizes erased at a loss of about a point with generated triggers of 5 pixels.",
)
