"""What a search says of a model is worth nothing where the model is not fed as it was trained, or answers to nothing."""

from dhbe.records import Verdict
from dhbe.suspects import Suspect

FOUND = ("backdoored", "still answers", "damaged", "answers", "changed")
"""Verdicts that stay where only the constants are in doubt: something was seen."""


def judged(verdict: Verdict | None, suspect: Suspect) -> tuple[Verdict | None, str | None]:
    """A verdict, and what makes it doubtful, if anything does.

    Args:
        verdict: What the search says; None if it says nothing.
        suspect: What was searched.
    """
    if verdict is not None and suspect.unusable:
        return "input not usable", suspect.unusable
    if verdict is not None and verdict not in FOUND and suspect.unsure:
        return "unclear", suspect.unsure
    return verdict, None
