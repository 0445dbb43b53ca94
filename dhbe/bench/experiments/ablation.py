"""Ours: an ablation of the components of `fast`."""

from typing import Any

from dhbe.bench import Case, Experiment, Grid, Scale, erased

TAKEN_OUT: dict[str, tuple[dict[str, Any], str | None]] = {
    "nothing": ({}, None),
    "no class singled out, all light": ({"anomaly_threshold": 1e9}, None),
    "every class restricted in full": ({}, "every class restricted in full"),
    "no search before the student moves": ({}, "no search before the student moves"),
    "patches only": ({"families_at_once": 0}, "patches only"),
    "no compact squares": ({}, "no compact squares"),
    "no search in the student": ({"families_at_once": 0}, None),
    "what is remembered is not retried": ({}, "what is remembered is not retried"),
    "never several at once": ({"room": 0.0}, None),
    "images not filtered": ({}, "images not filtered"),
    "images not evenly by class": ({}, "images not evenly by class"),
    "photographs alone": ({}, "photographs alone"),
    "gradient without a bound": ({"clip": 1e30}, None),
}
"""Settings that differ, and a component of `bench.parts` to disable."""


def cases(scale: Scale) -> list[Case]:
    """Each on a Trojaning victim."""
    victim, tiny = scale.victim("trojaning", scale.sizes[1]), scale.budgets.get("fast", {})
    chosen = list(TAKEN_OUT.items())[:: 3 if scale.name == "smoke" else 1]
    return [
        erased(victim, "fast", {**tiny, **changes}, without=without, seed=seed, minutes=scale.minutes["dhbe"]).labelled(
            **{"taken out": name}
        )
        for name, (changes, without) in chosen
        for seed in scale.seeds[:1]
    ]


EXPERIMENT = Experiment(
    title="Ablation: the parts of the preset fast",
    cases=cases,
    draw=[Grid(rows=("taken out",), values=("acc", "lost", "asr", "asr_x9", "agreement", "seconds"))],
)
