"""ACC and ASR of a classifier, measured on data."""

import copy
from collections.abc import Sequence

from torch import nn

from dhbe import suspects
from dhbe.api import machine
from dhbe.data import Shape
from dhbe.evaluation.doubts import doubts
from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.measuring import check, measured
from dhbe.records import Measures
from dhbe.suspects import Suspect


def score(
    model: nn.Module | Suspect,
    evidence: Evidence,
    *,
    input_shape: Shape | None = None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    device: str = "auto",
) -> Measures:
    """Measures ACC and, with a trigger, ASR and amplified ASR; all are in [0, 1].

    Args:
        model: A network that takes normalised images, or what `suspects.load` returned.
        evidence: Labelled images, and optionally a trigger.
        input_shape: Image shape (channels, height, width), as in `erase`; not for a `Suspect`, which has its own.
        mean: Mean of each channel, as in `erase`.
        std: Standard deviation of each channel, as in `erase`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...

    Raises:
        Refused: The data, the trigger or the target do not fit the model.
    """
    return score_with_doubts(suspects.of(model, input_shape, mean, std), evidence, device=device)[0]


def score_with_doubts(suspect: Suspect, evidence: Evidence, *, device: str = "auto") -> tuple[Measures, list[str]]:
    """As `score`, with likely causes of error if the accuracy is no better than chance.

    Raises:
        Refused: As for `score`.
    """
    check(evidence, suspect.info)
    classifier = copy.deepcopy(suspect.classifier).to(machine.device(device))
    found = measured(classifier, evidence)
    said = doubts(classifier, evidence, found)
    return found.model_copy(update={"asr_victim": None}), said  # there is no victim to compare with here
