"""The data that a classifier is measured with: images, and optionally the trigger. No defence can import this."""

from dataclasses import dataclass

from dhbe.attacks import Target
from dhbe.attacks.triggers import Trigger
from dhbe.data import Images


@dataclass(frozen=True, eq=False)
class Evidence:
    """Data that a run is measured with, and which is never handed to a defence."""

    images: Images
    name: str = ""
    trigger: Trigger | None = None
    target: Target | None = None
    """The target class; "next" is each image's own class plus one (all-to-all)."""
    source: int | None = None
    """The only class whose images the trigger is for (one-to-one)."""

    @property
    def one_target(self) -> int | None:
        """The target, if it is the same for all images."""
        return None if self.target == "next" else self.target
