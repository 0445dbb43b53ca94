"""Exit codes."""

DONE, FOUND, USAGE, UNCLEAR, FAILED, INTERRUPTED = 0, 1, 2, 3, 4, 130
"""Done; a backdoor was found or is left, or a gate failed; refused input; the verdict is one of `OPEN`; failed run; interrupted."""

OPEN = ("unclear", "label contradicted", "input not usable")


def of(verdict: str | None, fail_on: str = "unclear") -> int:
    """The exit code that goes with a verdict.

    Args:
        verdict: Of a record; None is no reason to fail.
        fail_on: `unclear`, or `found`: then only what was found fails.
    """
    from dhbe.records import SEEN  # not before a verb has run: its schema takes time

    if verdict in SEEN:
        return FOUND
    return UNCLEAR if verdict in OPEN and fail_on == "unclear" else DONE
