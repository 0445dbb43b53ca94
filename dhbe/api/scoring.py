"""ACC and ASR of a classifier that somebody holds data for."""

import copy

from dhbe.api import machine
from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.measuring import check, measured
from dhbe.records import Measures
from dhbe.suspects import Suspect


def score(suspect: Suspect, evidence: Evidence, *, device: str = "auto") -> Measures:
    """ACC, and with a trigger ASR and amplified ASR.

    Raises:
        Refused: The data, the trigger or the target do not fit the model.
    """
    check(evidence, suspect.info)
    found = measured(copy.deepcopy(suspect.classifier).to(machine.device(device)), evidence)
    return found.model_copy(update={"asr_victim": None})  # who the victim was is not known here
