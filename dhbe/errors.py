"""The exceptions of this package."""

from dhbe.flags import in_python


class _Told(Exception):
    """An error whose message names options, in words of Python for whoever calls a function, as `str` has it."""

    @property
    def flagged(self) -> str:
        """The message with flags, for the command line."""
        return super().__str__()

    def __str__(self) -> str:
        return in_python(self.flagged)


class Refused(_Told, ValueError):
    """Unusable input; the message is one line that says what is wrong and how to fix it (exit code 2)."""


class Failed(_Told, RuntimeError):
    """A run with valid input that could not be finished, say because of a full disk or divergence (exit code 4)."""


class Interrupted(Exception):
    """The user stopped a run; its state is saved (exit code 130)."""


def said(error: object) -> str:
    """The message of any error, ours with flags, to become part of another message."""
    return error.flagged if isinstance(error, _Told) else str(error)


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
    "could not create a primitive",  # oneDNN, without memory for its code or scratchpad
    "could not create a memory",
    "could not execute a primitive",
    "can't start new thread",  # no memory for its stack
    "resource temporarily unavailable",
)
"""Lower-case fragments of messages with which torch and its libraries report a lack of memory."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one in its context, means that memory ran out."""
    said = str(error).lower()
    if isinstance(error, MemoryError) or any(words in said for words in OUT_OF_MEMORY):
        return True
    return error.__context__ is not None and out_of_memory(error.__context__)
