"""Exit codes: done; done but a gate failed; refused input; failed run; interrupted with the state saved."""

DONE, GATE, USAGE, FAILED, INTERRUPTED = 0, 1, 2, 4, 130
