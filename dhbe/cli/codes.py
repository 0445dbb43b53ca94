"""Exit codes."""

DONE, FOUND, USAGE, UNCLEAR, FAILED, INTERRUPTED = 0, 1, 2, 3, 4, 130
"""Done; a backdoor was found or remains, or a gate failed; input refused; verdict in `OPEN`; run failed; interrupted."""

OPEN = ("unclear", "label contradicted", "input not usable")
"""Verdicts that neither find nor exclude a backdoor."""


def of(verdict: str | None, fail_on: str = "unclear") -> int:
    """The exit code for a verdict.

    Args:
        verdict: Verdict of a record; None counts as success.
        fail_on: `unclear`, or `found`, with which these verdicts count as success.
    """
    from dhbe.records import SEEN  # a slow import, needed only after a verb has run

    if verdict in SEEN:
        return FOUND
    return UNCLEAR if verdict in OPEN and fail_on == "unclear" else DONE
