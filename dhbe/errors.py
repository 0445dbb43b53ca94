"""The ways in which this package says no."""


class Refused(ValueError):
    """Input that cannot be used: one line that says what is wrong and how to mend it (exit code 2)."""


class Failed(RuntimeError):
    """A run that began rightly and could not be finished: a full disk, a diverged model (exit code 4)."""


class Interrupted(Exception):
    """Somebody asked a run to stop; its state is saved (exit code 130)."""


OUT_OF_MEMORY = (
    "out of memory",  # torch on CUDA, ROCm, MPS and XPU; the driver
    "can't allocate memory",  # torch's allocator on the CPU
    "cannot allocate memory",  # the system, as at mmap
    "not enough memory",
    "failed to allocate",
    "size calculation overflowed",  # more bytes than a number holds
    "bad_alloc",  # C++
    "alloc_failed",  # CUBLAS_STATUS_, CUDNN_STATUS_, CUSPARSE_STATUS_, CUFFT_
    "allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "insufficient_resources",
    "could not create a primitive",  # oneDNN, which then has no room for its code or scratchpad
    "could not create a memory",
    "could not execute a primitive",
    "can't start new thread",  # there is no room for its stack
    "resource temporarily unavailable",
)
"""Ways in which torch and what it stands on say that memory does not suffice, in small letters."""


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says, or one that it came of, in the words of Python or torch."""
    said = str(error).lower()
    if isinstance(error, MemoryError) or any(words in said for words in OUT_OF_MEMORY):
        return True
    return error.__context__ is not None and out_of_memory(error.__context__)
