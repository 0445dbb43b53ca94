"""The ways in which this package says no."""


class Refused(ValueError):
    """Input that cannot be used: one line that says what is wrong and how to mend it (exit code 2)."""


class Failed(RuntimeError):
    """A run that began rightly and could not be finished: a full disk, a diverged model (exit code 4)."""


class Interrupted(Exception):
    """Somebody asked a run to stop; its state is saved (exit code 130)."""


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says, or one that it came of, in the words of Python or torch."""
    said = ("out of memory", "can't allocate memory", "not enough memory", "size calculation overflowed")
    if isinstance(error, MemoryError) or any(words in str(error) for words in said):
        return True
    return error.__context__ is not None and out_of_memory(error.__context__)
