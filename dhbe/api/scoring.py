"""ACC and ASR of a classifier that somebody holds data for."""

import copy

from dhbe.api import machine
from dhbe.evaluation.doubts import doubts
from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.measuring import check, measured
from dhbe.records import Measures
from dhbe.suspects import Suspect


def score(suspect: Suspect, evidence: Evidence, *, device: str = "auto") -> Measures:
    """ACC, and with a trigger ASR and amplified ASR.

    Raises:
        Refused: The data, the trigger or the target do not fit the model.
    """
    return score_with_doubts(suspect, evidence, device=device)[0]


def score_with_doubts(suspect: Suspect, evidence: Evidence, *, device: str = "auto") -> tuple[Measures, list[str]]:
    """The same, and what is likely wrong where the accuracy is that of guessing.

    Raises:
        Refused: As `score`.
    """
    check(evidence, suspect.info)
    classifier = copy.deepcopy(suspect.classifier).to(machine.device(device))
    found = measured(classifier, evidence)
    said = doubts(classifier, evidence, found)
    return found.model_copy(update={"asr_victim": None}), said  # who the victim was is not known here
