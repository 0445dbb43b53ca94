"""Where memory does not suffice, a run begins anew with half the batch."""

from typing import Any, TypeVar

from dhbe import settings
from dhbe.errors import out_of_memory

HALVINGS = 3
"""Of the batches at the most."""

SMALLEST = 4
"""To which a batch may be halved: of patches of one pixel it must still have a variance."""

BATCHES = ("batch", "search_batch")
"""Settings that say how many images there are in one pass; the first that a method has is told."""

Settings = TypeVar("Settings")


def fits_with_less(error: BaseException, used: Any, before: int) -> bool:
    """Whether an error says that memory ran out, and the batch can be halved once more after so many times before.

    Args:
        error: What ended the run.
        used: The settings that it had: a dataclass of hyperparameters, as a defence or a survey.
        before: How often they were halved.
    """
    return out_of_memory(error) and before < HALVINGS and _told(used) >= 2 * SMALLEST


def halved(asked: Settings, times: int) -> Settings:
    """The same settings with their batches, wherever they stand, halved so often."""
    return settings.changed(asked, {name: max(1, batch // 2**times) for name, batch in batches(asked).items()})


def batches(asked: Any) -> dict[str, int]:
    """The settings that are halved, by name."""
    values = settings.flat(asked)
    return {name: values[name] for name in BATCHES if name in values}


def recorded(asked: Any, times: int) -> dict[str, Any]:
    """What a record says of a run whose batches were halved so often: all settings that it had, and the batches asked for."""
    told = {f"asked_{name}": batch for name, batch in batches(asked).items()} if times else {}
    return settings.flat(halved(asked, times)) | told


def remarks(asked: Any, times: int) -> list[str]:
    """What the user is told of it, for each time."""
    return [
        f"the memory did not suffice: begun anew with batches of {_told(halved(asked, number))}"
        for number in range(1, times + 1)
    ]


def _told(used: Any) -> int:
    return next(iter(batches(used).values()), 0)
