"""Figure 9: pure distillation against DHBE, on many triggers."""

from dhbe.bench import Experiment, Grid
from dhbe.bench.experiments.figure_6 import cases

EXPERIMENT = Experiment(
    title="Figure 9: pure distillation and DHBE",
    cases=lambda scale: cases(scale, ("dfad", "inversion", "dhbe")),
    draw=[Grid(rows=("trigger",), columns="defense", values=("acc", "asr"), mean=True)],
    note="The paper finds up to 98 % ASR and 50 % on average after pure adversarial distillation, and nearly 0 % after DHBE; "
    "and much the same as the former of distillation on inverted images (section 5.4.4).",
)
