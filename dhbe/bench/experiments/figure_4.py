"""Figure 4: ASR against ACC, for defences that find a trigger first."""

from dhbe.bench import Curves, Experiment
from dhbe.bench.experiments.figure_3 import cases

EXPERIMENT = Experiment(
    title="Figure 4: ACC against ASR, targeted erasing methods",
    cases=lambda scale: cases(scale, ("neural-cleanse", "gdm"), sizes=2),
    draw=[Curves(x="acc", y=("asr",), lines=("defense", "data"), panels="size", fitted=True)],
    note="A point is one learning rate on one subset of the clean data; the curve is the logistic one through them.",
)
