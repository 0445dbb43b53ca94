"""Ours: the default erasure on a victim of every attack."""

from dhbe.bench import Case, Experiment, Grid, Scale

SIZED = ("badnets", "clean-label", "trojaning")
OTHERS = ("blend", "sig", "lsb", "refool", "wanet")


def cases(scale: Scale) -> list[Case]:
    """The preset `fast` on each of them, and on a clean model."""
    victims = {f"{attack}-{size}": scale.victim(attack, size) for attack in SIZED for size in scale.sizes}
    victims |= {attack: scale.victim(attack) for attack in OTHERS if attack in scale.attacks or scale.name == "paper"}
    victims["clean"] = scale.clean()
    return [
        scale.theirs(victim, "fast", seed=seed, victim=name) for name, victim in victims.items() for seed in scale.seeds
    ]


EXPERIMENT = Experiment(
    title="Erasures: the default settings on every attack",
    cases=cases,
    draw=[Grid(rows=("victim",), values=("acc", "lost", "asr", "asr_x4", "asr_x9", "seconds"))],
    note="The tables of README and docs/results.md are of the victims in `zoo/` and of third-party ones: `python -m experiments.table`.",
)
