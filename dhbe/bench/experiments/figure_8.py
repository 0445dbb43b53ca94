"""Figure 8: the weight of the restriction."""

from dhbe.bench import Case, Curves, Experiment, Scale


def cases(scale: Scale) -> list[Case]:
    """DHBE with each alpha."""
    victim = scale.victim("badnets", scale.sizes[0])
    return [
        scale.ours(victim, seed=seed, changes={"alpha": alpha}, alpha=alpha)
        for alpha in scale.alphas
        for seed in scale.seeds
    ]


EXPERIMENT = Experiment(
    title="Figure 8: alpha",
    cases=cases,
    draw=[Curves(x="alpha", y=("acc", "asr", "features_l1"))],
    note="The paper finds ACC kept and ASR near zero for alpha from 0.01 to 0.2 of its own loop. The preset `fast`, which "
    "stands for DHBE at the scale small, weighs its terms in another way: 1 is its default.",
)
