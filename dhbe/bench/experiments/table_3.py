"""Table 3: DHBE against defences without trigger inversion."""

from itertools import product

from dhbe.bench import Case, Experiment, Grid, Scale
from dhbe.bench.paper import ATTACKS, ERASED

DEFENSES = ("finetuning", "fine-pruning", "mcr", "nad", "dhbe")


def cases(scale: Scale, defenses: tuple[str, ...] = DEFENSES) -> list[Case]:
    """Every defence on every victim, and the victims themselves."""
    found = []
    for attack, size in product(ATTACKS, scale.sizes):
        victim = scale.victim(attack, size)
        found.append(victim.labelled(attack=attack, size=size, defense="none"))
        found += [
            scale.by(victim, defense, seed=seed, attack=attack, size=size)
            for defense, seed in product(defenses, scale.seeds)
        ]
    return found


EXPERIMENT = Experiment(
    title="Table 3: DHBE against blind erasing methods",
    cases=cases,
    draw=[Grid(rows=("attack", "size"), columns="defense", values=("acc", "asr"), paper=ERASED, mean=True)],
)
