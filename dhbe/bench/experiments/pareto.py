"""Ours: accuracy, attack success and time of presets and settings."""

from typing import Any

from dhbe.bench import Case, Experiment, Grid, Scale, erased
from dhbe.bench.drawing import Curves

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fast": ("fast", {}),
    "a quarter of the rounds": ("fast", {"iterations": 10}),
    "half the rounds": ("fast", {"iterations": 20}),
    "twice the rounds": ("fast", {"iterations": 80}),
    "one cycle": ("fast", {"cycles": 1}),
    "half the search": ("fast", {"warm_up": 30}),
    "half the batch": ("fast", {"batch": 64}),
    "fewer steps a round": ("fast", {"student_steps": 2}),
    "paper, 1/200 of it": ("paper", {"iterations": 75}),
    "official, 1/500 of it": ("official", {"iterations": 30}),
}
"""A preset, and settings that differ from it."""


def cases(scale: Scale) -> list[Case]:
    """Each setting on a BadNets and a Trojaning victim."""
    victims = {
        "badnets": scale.victim("badnets", scale.sizes[0]),
        "trojaning": scale.victim("trojaning", scale.sizes[1]),
    }
    chosen = dict(list(SETTINGS.items())[:1] + list(SETTINGS.items())[-2:]) if scale.name == "smoke" else SETTINGS
    tiny = {
        "fast": scale.budgets.get("fast", {}),
        "paper": {"iterations": 2, "batch": 16},
        "official": {"iterations": 1, "batch": 16},
    }
    return [
        erased(
            victim, preset, {**changes, **(tiny[preset] if scale.name == "smoke" else {})}, minutes=scale.minutes["dhbe"],
            victim=name, setting=setting,
        )
        for name, victim in victims.items()
        for setting, (preset, changes) in chosen.items()
    ]  # fmt: skip


EXPERIMENT = Experiment(
    title="Pareto: settings by what they cost and bring",
    cases=cases,
    draw=[
        Grid(rows=("setting",), columns="victim", values=("seconds", "lost", "asr")),
        Curves(x="seconds", y=("lost", "asr"), lines=("setting",), panels="victim"),
    ],
)
