"""Parts of the preset `fast` that an ablation takes out, by name."""

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
"""Owner, name, and what stands in for it."""


def _nothing(*args: object, **more: object) -> None:
    """Stands in for a part that only has an effect."""


def _replaced(owner: type, name: str, stand_in: Callable[..., Any]) -> Change:
    """A method that is called with the one whose place it takes."""
    own = getattr(owner, name)
    return owner, name, lambda *args, **more: stand_in(own, *args, **more)


def _all_alike(tried: Callable[..., torch.Tensor], self: TriggerBank, *args: object) -> torch.Tensor:
    """All triggers are shown as often, whether they act or not."""
    return torch.ones_like(self.gain)


_PATCHES = torch.tensor([kind is Patches for kind in FAMILIES])[:, None]


def _patches_stand_out(outliers: Callable[..., torch.Tensor], self: Survey, anomaly: torch.Tensor) -> torch.Tensor:
    """Only patches at random places are known, as in the paper."""
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
    """Inside, a part does nothing; None takes out none."""
    with ExitStack() as stack:
        for owner, name, stand_in in PARTS[part] if part else ():
            stack.enter_context(patch.object(owner, name, stand_in))
        yield
