"""Components of the preset `fast` that can be ablated, by name."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from dhbe.search import families
from dhbe.search.families import FAMILIES, Patches
from dhbe.search.image_pool import ImagePool
from dhbe.search.survey import Findings, Survey
from dhbe.search.trigger_bank import TriggerBank

Change = tuple[Any, str, Any]
"""Owner and name of an attribute, and its replacement."""


def _nothing(*args: object, **more: object) -> None:
    """Replaces a function that is called for its side effects only."""


def _replaced(owner: type, name: str, stand_in: Callable[..., Any]) -> Change:
    """Makes a method that receives the original method as its first argument."""
    own = getattr(owner, name)
    return owner, name, lambda *args, **more: stand_in(own, *args, **more)


def _all_alike(tried: Callable[..., torch.Tensor], self: TriggerBank, *args: object) -> torch.Tensor:
    """Draws all triggers equally often, whether they act or not."""
    return torch.ones_like(self.gain)


_PATCHES = torch.tensor([kind is Patches for kind in FAMILIES])[:, None]


def _patches_stand_out(outliers: Callable[..., torch.Tensor], self: Survey, anomaly: torch.Tensor) -> torch.Tensor:
    """Restricts the families to patches at random positions, as in the paper."""
    return outliers(self, anomaly) & _PATCHES


PARTS: dict[str, tuple[Change, ...]] = {
    "every class restricted in full": (
        _replaced(Survey, "outliers", lambda own, self, anomaly: torch.ones_like(anomaly, dtype=torch.bool)),
    ),
    "no search before the student moves": ((Survey, "step", lambda *args: {}),),
    "patches only": (
        _replaced(Survey, "outliers", _patches_stand_out),
        (Findings, "sought", property(lambda self: (self.outliers if self.backdoored else _PATCHES) & _PATCHES)),
    ),
    "no compact squares": ((families.Masked, "compact", False),),
    "what is remembered is not retried": (_replaced(TriggerBank, "tried", _all_alike),),
    "images not filtered": ((ImagePool, "filter", _nothing),),
    "images not evenly by class": (
        _replaced(ImagePool, "sample", lambda own, self, count, evenly=False: own(self, count)),
    ),
    "photographs alone": ((ImagePool, "renew", _nothing),),
}  # fmt: skip


@contextmanager
def taken_out(part: str | None) -> Iterator[None]:
    """Disables a component inside; None disables nothing."""
    with ExitStack() as stack:
        for owner, name, stand_in in PARTS[part] if part else ():
            stack.enter_context(patch.object(owner, name, stand_in))
        yield
