"""Table 6: the trigger four and nine times."""

from dhbe.bench import Case, Experiment, Grid, Scale
from dhbe.bench.experiments.table_3 import cases as all_cases
from dhbe.bench.paper import AMPLIFIED

DEFENSES = ("finetuning", "fine-pruning", "nad", "neural-cleanse", "gdm", "dhbe")


def cases(scale: Scale) -> list[Case]:
    """The BadNets rows of tables 3 and 5."""
    return [case for case in all_cases(scale, DEFENSES) if case.labels["attack"] == "badnets"]


EXPERIMENT = Experiment(
    title="Table 6: amplified triggers",
    cases=cases,
    draw=[Grid(rows=("size",), columns="defense", values=("asr", "asr_x4", "asr_x9"), paper=AMPLIFIED, mean=True)],
)
