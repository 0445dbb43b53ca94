"""Figure 3: ASR against ACC, for defences without trigger inversion."""

from itertools import product

from dhbe.bench import Case, Curves, Experiment, Scale

DEFENSES = ("finetuning", "fine-pruning", "nad")


def cases(scale: Scale, defenses: tuple[str, ...] = DEFENSES, sizes: int = 3) -> list[Case]:
    """Each defence at each learning rate, with each share of the data and on each subset; and DHBE."""
    found = []
    for size in scale.sizes[: 1 if scale.name == "smoke" else sizes]:
        victim = scale.victim("badnets", size)
        found += [
            scale.by(victim, defense, changes={"lr": lr}, share=share, subset=subset, size=size, lr=lr, data=share)
            for defense, lr, share, subset in product(defenses, scale.rates, scale.shares, scale.subsets)
        ]
        found += [scale.by(victim, "dhbe", seed=seed, size=size, data="none", lr="") for seed in scale.seeds]
    return found


EXPERIMENT = Experiment(
    title="Figure 3: ACC against ASR, blind erasing methods",
    cases=cases,
    draw=[Curves(x="acc", y=("asr",), lines=("defense", "data"), panels="size", fitted=True)],
    note="A point is one learning rate on one subset of the clean data; the curve is the logistic one through them.",
)
