"""Qualifies verdicts: a search means nothing if the model's input is normalised wrongly or it responds to no input."""

import torch

from dhbe.classifier import Classifier
from dhbe.records import SEEN, Measures, Verdict
from dhbe.suspects import Suspect


def judged(verdict: Verdict | None, suspect: Suspect) -> tuple[Verdict | None, str | None]:
    """The final verdict, and the reason for doubting it, if any.

    Args:
        verdict: The verdict of the search; None if it has none.
        suspect: The model searched.
    """
    if verdict is not None and suspect.unusable:
        return "input not usable", suspect.unusable
    if verdict is not None and verdict not in SEEN and suspect.unsure:
        return "label contradicted" if suspect.labelled else "unclear", suspect.unsure
    return verdict, None


LITTLE = 0.1
"""An ASR in [0, 1] below which a trigger counts as suppressed, and the least fall of a higher one that is an effect."""


def ineffective(before: Measures, after: Measures, victim: Classifier, cleaned: Classifier) -> bool:
    """Whether a defence had no effect: on the ASR, if it was measured; else on any weight."""
    if before.asr is not None and after.asr is not None:
        return after.asr >= LITTLE and after.asr > before.asr - LITTLE
    old, new = victim.network.state_dict(), cleaned.network.state_dict()
    return all(torch.equal(old[name], new[name].to(old[name].device)) for name in old)
