"""Figure 12: images used by data-free defences, generated and inverted."""

from dhbe.bench import Case, Experiment, Scale
from dhbe.bench.drawing import Pictures


def cases(scale: Scale) -> list[Case]:
    """Images of DHBE, and of distillation on inverted images."""
    victim, (preset, settings) = scale.victim("badnets", scale.sizes[0]), scale.dhbe
    kinds = {"dhbe": (preset, settings), "inversion": ("inversion", scale.budgets.get("inversion", {}))}
    return [
        Case(
            work="imagine", settings={"defense": defense, "settings": dict(changes), "seed": 0}, needs=(victim,),
            name=f"images-of-{kind}", labels={"images": kind}, minutes=scale.minutes["dhbe"],
        )
        for kind, (defense, changes) in kinds.items()
    ]  # fmt: skip


EXPERIMENT = Experiment(
    title="Figure 12: generated and inverted images", cases=cases, draw=[Pictures(label="images")],
    note="The paper's point is that generated images show nothing of the training data, and inverted ones do.",
)  # fmt: skip
