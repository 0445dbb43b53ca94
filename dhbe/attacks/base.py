"""The one contract of all attacks: a frozen dataclass of hyperparameters that poisons a training set."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from dhbe.attacks.triggers import Trigger
from dhbe.classifier import Classifier
from dhbe.data import Images, Shape
from dhbe.errors import Failed, Refused


@dataclass(frozen=True, eq=False)
class Backdoor:
    """A backdoored classifier with all that its attacker knows."""

    classifier: Classifier
    trigger: Trigger
    target: int
    """The class that triggered images are to be taken for."""


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Turns clean training images into poisoned ones; whoever trains on them trains a backdoor in.

    A subclass is a frozen dataclass whose fields are its hyperparameters, with `trigger_for` and `poison`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for lists of attacks."""

    target: int = -1
    """Class that triggered images are to be taken for; negative numbers count from the last class."""
    min_asr: float = 0.95
    """ASR below which the attack has failed, as a fraction."""

    @abstractmethod
    def trigger_for(self, shape: Shape) -> Trigger:
        """The trigger for images of shape (c, h, w)."""

    @abstractmethod
    def poison(self, images: Images, seed: int) -> Images:
        """A poisoned copy of the training images; the same seed poisons the same ones."""

    def target_in(self, classes: int) -> int:
        """The target's number, from 0, among so many classes.

        Raises:
            Refused: There is no such class.
        """
        if not -classes <= self.target < classes:
            raise Refused(f"no target class {self.target}: the data has {classes} classes, 0 to {classes - 1}")
        return self.target % classes

    def confirm(self, asr: float) -> None:
        """Passes if the backdoor took.

        Args:
            asr: ASR of the trained classifier on test images, as a fraction.

        Raises:
            Failed: The ASR lies below `min_asr`.
        """
        if asr < self.min_asr:
            raise Failed(
                f"the attack {self.name} failed: ASR {asr:.3f}, expected at least {self.min_asr:g}; "
                "poison more images, train longer, take a larger trigger, or accept less with min_asr"
            )
