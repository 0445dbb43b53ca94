"""Figure 10: DHBE's learning rates."""

from dhbe.bench import Case, Curves, Experiment, Scale

USUAL = {"paper": {"lr": 0.1, "lr_generators": 1e-3}, "fast": {"lr": 5e-3}}


def cases(scale: Scale) -> list[Case]:
    """DHBE with all its learning rates times a factor."""
    victim, usual = scale.victim("badnets", scale.sizes[0]), USUAL[scale.dhbe[0]]
    return [
        scale.ours(victim, seed=seed, changes={name: rate * factor for name, rate in usual.items()}, factor=factor)
        for factor in scale.factors
        for seed in scale.seeds
    ]


EXPERIMENT = Experiment(
    title="Figure 10: learning rates",
    cases=cases,
    draw=[Curves(x="factor", y=("acc", "asr"), title="Learning rates, times a factor.")],
    note="The paper finds next to no difference between rates of 0.01 and 0.2; its default is 0.1.",
)
