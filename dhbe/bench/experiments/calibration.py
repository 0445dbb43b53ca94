"""Ours: how far classes stand out of clean and of backdoored classifiers."""

from dhbe.bench import Case, Experiment, Grid, Scale, scanned


def cases(scale: Scale) -> list[Case]:
    """A scan of victims of several attacks and targets, and of clean models."""
    survey = scale.budgets.get("scan", {})
    victims = {
        "clean": scale.clean(),
        **{f"clean, {arch}": scale.clean(arch=arch) for arch in scale.archs},
        **{f"badnets-{size}": scale.victim("badnets", size) for size in scale.sizes},
        "trojaning": scale.victim("trojaning", scale.sizes[1]),
        **{attack: scale.victim(attack) for attack in ("blend", "sig", "lsb")},
    }
    return [
        scanned(victim, survey, minutes=scale.minutes["dhbe"], victim=name) for name, victim in victims.items()
    ]


EXPERIMENT = Experiment(
    title="Calibration: how far classes stand out",
    cases=cases,
    draw=[Grid(rows=("victim",), values=("anomaly_index", "suspected_class", "probability", "evidence", "seconds"))],
    note="The threshold of `dhbe scan` was fitted on other classifiers: `python -m experiments.calibration table`.",
)
