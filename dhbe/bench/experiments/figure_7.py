"""Figure 7: changes of activations by the trigger."""

from dhbe.bench import Experiment
from dhbe.bench.drawing import Boxes
from dhbe.bench.experiments.table_6 import cases

EXPERIMENT = Experiment(
    title="Figure 7: activation differences",
    cases=lambda scale: [case for case in cases(scale) if case.labels["size"] == scale.sizes[0]],
    draw=[Boxes(measures=("features_l1", "features_l2", "logits_l1", "logits_l2"), label="defense")],
)
