"""Figure 5: images with one, four and nine triggers."""

from dhbe.bench import Case, Experiment, Scale
from dhbe.bench.drawing import Pictures


def cases(scale: Scale) -> list[Case]:
    """One for each size."""
    told = {"data": scale.data, "tested": 8}
    return [
        Case(
            work="amplify", settings={**told, "trigger": f"badnets:{size}"}, name=f"amplified-{size}",
            labels={"trigger": f"badnets:{size}"}, minutes=0.02,
        )
        for size in scale.sizes
    ]  # fmt: skip


EXPERIMENT = Experiment(title="Figure 5: amplified triggers", cases=cases, draw=[Pictures(label="trigger")])
