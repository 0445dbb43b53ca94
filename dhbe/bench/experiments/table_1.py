"""Table 1: changes of images by triggers."""

from dhbe.bench import Case, Experiment, Grid, Scale

TRIGGERS = (
    "pixel", "badnets:3", "badnets:5", "badnets:7", "badnets:3:white", "scattered:16", "blend:0.1", "blend:0.2", "sig:20",
    "sig:40", "lsb:1", "lsb:2", "faint:8", "refool:focus", "refool:ghost", "warp:0.5",
)  # fmt: skip


def cases(scale: Scale) -> list[Case]:
    """One for each trigger."""
    told = {"data": scale.data, "tested": scale.tested or 1000}
    return [
        Case(work="move", settings={**told, "trigger": trigger}, name="move", labels={"trigger": trigger}, minutes=0.02)
        for trigger in TRIGGERS
    ]


EXPERIMENT = Experiment(
    title="Table 1: how far triggers move an image",
    cases=cases,
    draw=[Grid(rows=("trigger",), values=("distance",), title="Mean L1 norm of the change, pixels in [0, 1].")],
    note="The paper gives formulas, not figures, in a form that the text at hand has lost.",
)
