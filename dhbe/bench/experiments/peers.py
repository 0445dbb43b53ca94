"""Ours: every defence on two victims."""

from dhbe.bench import Case, Experiment, Grid, Scale

DEFENSES = (
    "finetuning", "fine-pruning", "mcr", "nad", "neural-cleanse", "gdm", "clp", "dfad", "otbr", "abd", "inversion", "dhbe",
)  # fmt: skip


def cases(scale: Scale) -> list[Case]:
    """All defences on a BadNets and on a Trojaning victim."""
    victims = {
        "badnets": scale.victim("badnets", scale.sizes[0]),
        "trojaning": scale.victim("trojaning", scale.sizes[1]),
    }
    return [
        scale.by(victim, defense, seed=seed, victim=name)
        for name, victim in victims.items()
        for defense in DEFENSES
        for seed in scale.seeds
    ]


EXPERIMENT = Experiment(
    title="Peers: every defence on two victims",
    cases=cases,
    draw=[Grid(rows=("victim", "defense"), values=("acc", "asr", "asr_x4", "asr_x9", "seconds", "mib"))],
)
