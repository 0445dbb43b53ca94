"""Table 5: DHBE against defences that find a trigger first."""

from dhbe.bench import Experiment, Grid
from dhbe.bench.experiments.table_3 import cases
from dhbe.bench.paper import ERASED

EXPERIMENT = Experiment(
    title="Table 5: DHBE against targeted erasing methods",
    cases=lambda scale: cases(scale, ("neural-cleanse", "gdm", "dhbe")),
    draw=[Grid(rows=("attack", "size"), columns="defense", values=("acc", "asr"), paper=ERASED, mean=True)],
)
