"""Figure 6: many square triggers, DHBE and GDM."""

from itertools import product

from dhbe.bench import Case, Experiment, Grid, Scale


def cases(scale: Scale, defenses: tuple[str, ...] = ("gdm", "dhbe")) -> list[Case]:
    """Each defence on victims with different random squares, the first a checkerboard."""
    found = []
    for number in range(scale.triggers):
        style = "checkerboard" if number == 0 else f"random-{number}"
        how = {} if number == 0 else {"style": "random", "pattern": number}
        victim = scale.victim("badnets", scale.sizes[0], **how)
        found.append(victim.labelled(trigger=style, defense="none"))
        found += [
            scale.by(victim, defense, seed=seed, trigger=style) for defense, seed in product(defenses, scale.seeds[:1])
        ]
    return found


EXPERIMENT = Experiment(
    title="Figure 6: many triggers, DHBE and GDM",
    cases=cases,
    draw=[Grid(rows=("trigger",), columns="defense", values=("acc", "asr"), mean=True)],
)
