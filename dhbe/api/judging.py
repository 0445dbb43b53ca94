"""What a search says of a model is worth nothing where the model is not fed as it was trained, or answers to nothing."""

import torch

from dhbe.classifier import Classifier
from dhbe.records import SEEN, Measures, Verdict
from dhbe.suspects import Suspect


def judged(verdict: Verdict | None, suspect: Suspect) -> tuple[Verdict | None, str | None]:
    """A verdict, and what makes it doubtful, if anything does.

    Args:
        verdict: What the search says; None if it says nothing.
        suspect: What was searched.
    """
    if verdict is not None and suspect.unusable:
        return "input not usable", suspect.unusable
    if verdict is not None and verdict not in SEEN and suspect.unsure:
        return "label contradicted" if suspect.labelled else "unclear", suspect.unsure
    return verdict, None


LITTLE = 0.1
"""By how much the ASR must fall for a defence to have had an effect."""


def ineffective(before: Measures, after: Measures, victim: Classifier, cleaned: Classifier) -> bool:
    """Whether a defence had no effect: where a trigger was measured, on it; else whether it changed no weight."""
    if before.asr is not None and after.asr is not None:
        return before.asr >= LITTLE and after.asr > before.asr - LITTLE
    old, new = victim.network.state_dict(), cleaned.network.state_dict()
    return all(torch.equal(old[name], new[name].to(old[name].device)) for name in old)
