"""Restarts a run with half the batch when memory runs out."""

from typing import Any, TypeVar

from dhbe import settings
from dhbe.errors import out_of_memory

HALVINGS = 3
"""Maximum number of halvings."""

SMALLEST = 4
"""Smallest batch after halving: even with patches of one pixel, BatchNorm needs a variance."""

BATCHES = ("batch", "search_batch")
"""Settings with the number of images per pass; remarks mention the first that a method has."""

Settings = TypeVar("Settings")


def fits_with_less(error: BaseException, used: Any, before: int) -> bool:
    """Whether an error means that memory ran out and the batch can be halved once more.

    Args:
        error: The error that ended the run.
        used: The settings of that run: a dataclass of hyperparameters, such as a defence or a survey.
        before: How often they were halved already.
    """
    return out_of_memory(error) and before < HALVINGS and _told(used) >= 2 * SMALLEST


def halved(asked: Settings, times: int) -> Settings:
    """The settings with their batches, also those in groups, halved `times` times."""
    return settings.changed(asked, {name: max(1, batch // 2**times) for name, batch in batches(asked).items()})


def batches(asked: Any) -> dict[str, int]:
    """The settings that are halved, by name."""
    values = settings.flat(asked)
    return {name: values[name] for name in BATCHES if name in values}


def recorded(asked: Any, times: int) -> dict[str, Any]:
    """The settings for the record of a run after `times` halvings: those used, and the batches asked for."""
    told = {f"asked_{name}": batch for name, batch in batches(asked).items()} if times else {}
    return settings.flat(halved(asked, times)) | told


def remarks(asked: Any, times: int) -> list[str]:
    """A remark to the user for each halving."""
    return [
        f"out of memory: restarted with batches of {_told(halved(asked, number))}" for number in range(1, times + 1)
    ]


def _told(used: Any) -> int:
    return next(iter(batches(used).values()), 0)
