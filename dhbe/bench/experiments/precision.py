"""Ours: whether bf16 costs quality."""

from dhbe.bench import Case, Experiment, Grid, Scale, erased


def cases(scale: Scale) -> list[Case]:
    """The preset `fast` in both precisions, some seeds each."""
    victim, tiny = scale.victim("badnets", scale.sizes[0]), scale.budgets.get("fast", {})
    seeds = (0,) if scale.name == "smoke" else (0, 1, 2, 3, 4)
    return [
        erased(
            victim, "fast", tiny, seed=seed, precision=precision, minutes=scale.minutes["dhbe"]
        ).labelled(precision=precision)
        for seed in seeds
        for precision in ("fp32", "bf16")
    ]  # fmt: skip


EXPERIMENT = Experiment(
    title="Precision: bf16 against fp32",
    cases=cases,
    draw=[Grid(rows=("precision",), values=("acc", "lost", "asr", "seconds"))],
)
