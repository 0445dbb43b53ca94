"""Where memory does not suffice, a run begins anew with half the batch."""

from dataclasses import replace
from typing import TypeVar

from dhbe.defenses import Defense
from dhbe.defenses.base import LEAST
from dhbe.errors import out_of_memory

HALVINGS = 3
"""Of the batch at the most."""

Settings = TypeVar("Settings", bound=Defense)


def fits_with_less(error: BaseException, settings: Defense, before: int) -> bool:
    """Whether an error says that memory ran out, and the batch can be halved once more after so many times before."""
    return out_of_memory(error) and before < HALVINGS and vars(settings).get("batch", 0) >= 2 * LEAST["batch"]


def halved(settings: Settings, times: int) -> Settings:
    """The same settings with their batch halved so often."""
    return replace(settings, **{"batch": vars(settings)["batch"] // 2**times}) if times else settings


def remarks(settings: Defense, times: int) -> list[str]:
    """What the user is told of it, for each time."""
    return [
        f"the memory did not suffice: begun anew with batches of {vars(halved(settings, number))['batch']}"
        for number in range(1, times + 1)
    ]
