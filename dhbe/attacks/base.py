"""The interface of all attacks: a frozen dataclass of hyperparameters that plants a backdoor."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from dhbe.attacks.triggers import Trigger
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.errors import Failed, Refused
from dhbe.run_state import RunState
from dhbe.settings import Setting
from dhbe.steps import Precision
from dhbe.training import Fit, Perturb, Watch, ignore

Target = int | Literal["next"]
"""The target class; "next" is each image's own class plus one."""


MinASR = Annotated[float, Setting("ASR below which the attack counts as failed, 0..1", most=1)]


@dataclass(frozen=True, eq=False)
class Workshop:
    """Everything that an attacker needs for training."""

    fit: Fit
    """Hyperparameters of the training."""
    fresh: Callable[[], Classifier]
    """Makes an untrained classifier for the data."""
    seed: int = 0
    clean: Classifier | None = None
    """A classifier trained on clean data, for attacks that start from one; None makes them train it."""
    watch: Watch = ignore
    """Called after each epoch of any training."""
    precision: Precision = "fp32"
    training: Callable[[], AbstractContextManager[RunState]] = lambda: nullcontext(RunState())
    """Opens the state of the next training. A resumed attack must ask for the same trainings in the same order."""

    def train(
        self,
        images: Images,
        classifier: Classifier | None = None,
        *,
        fit: Fit | None = None,
        tuned: Sequence[nn.Module] | None = None,
        perturb: Perturb | None = None,
    ) -> Classifier:
        """Trains a fresh classifier, or the given one in place; see `Fit` for the other arguments."""
        classifier = self.fresh() if classifier is None else classifier
        with self.training() as run_state:
            return (fit or self.fit)(
                classifier, images, self.watch, tuned=tuned, perturb=perturb, precision=self.precision,
                run_state=run_state,
            )  # fmt: skip

    def generator(self) -> torch.Generator:
        """A generator for the attack's own random choices; training uses torch's global one."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True, eq=False)
class Backdoor:
    """A backdoored classifier with the attacker's knowledge."""

    classifier: Classifier
    trigger: Trigger | None
    """The trigger; None if there is no backdoor."""
    target: Target | None
    """The target class; None if there is no backdoor."""
    source: int | None = None
    """The only class whose images the trigger is for; None means all but the target class."""
    chosen: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Indices of the training images that were changed, int64."""
    clean: Classifier | None = None
    """The clean classifier that the attack started from, if any."""


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Trains a backdoored classifier from clean training images.

    A subclass is a frozen dataclass whose fields are its hyperparameters, with one method, `plant`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for lists of attacks."""
    weights: ClassVar[str] = "backdoored.safetensors"
    """Name of the file for the trained model."""
    advice: ClassVar[str] = "poison more images, train longer, use a larger trigger, or lower min_asr"
    """What to try if the ASR is too low."""

    target: Annotated[
        int,
        Setting(
            "target class; negative numbers count from the last class",
            least=-math.inf,
        ),
    ] = -1
    min_asr: MinASR = 0.95
    max_drop: Annotated[
        float,
        Setting("loss of ACC against a clean model, if there is one, above which the attack counts as failed, 0..1"),
    ] = 0.02

    @abstractmethod
    def plant(self, images: Images, shop: Workshop) -> Backdoor:
        """Plants the backdoor.

        Args:
            images: Clean training images; they are not changed.
            shop: What to train with; equal seeds choose equal images.

        Raises:
            Refused: The settings are impossible with these images.
        """

    def trainings(self, fit: Fit, *, clean: bool) -> list[tuple[Fit, float]]:
        """The attack's trainings in order, each with the cost of a step relative to an ordinary one.

        Args:
            fit: Hyperparameters of the main training.
            clean: Whether a clean classifier is available.
        """
        return [(fit, 1.0)]

    def target_in(self, classes: int) -> int:
        """The target class as a number from 0.

        Raises:
            Refused: There is no such class.
        """
        return class_in(self.target, classes, "target")

    def confirm(self, asr: float | None, acc: float | None = None, clean_acc: float | None = None) -> None:
        """Checks that the attack reached its ASR and preserved accuracy; all rates are in [0, 1].

        Args:
            asr: ASR of the trained classifier on test images; None if it classifies no image correctly.
            acc: Its ACC.
            clean_acc: ACC of a clean classifier on the same images; None skips the check of ACC.

        Raises:
            Failed: The ASR is below `min_asr`, or the ACC more than `max_drop` below the clean one.
        """
        if asr is None or asr < self.min_asr:
            found = "undefined, as no image is classified correctly" if asr is None else f"{asr:.3f}"
            raise Failed(
                f"the attack {self.name} failed: ASR {found}, expected at least {self.min_asr:g}; {self.advice}"
            )
        if acc is not None and clean_acc is not None and acc < clean_acc - self.max_drop:
            raise Failed(
                f"the attack {self.name} failed: ACC {acc:.3f} is more than {self.max_drop:g} below the clean model's "
                f"{clean_acc:.3f}; poison fewer images, train longer, or raise max_drop"
            )


def class_in(number: int, classes: int, what: str) -> int:
    """A class number from 0, where negative `number` counts from the last class.

    Raises:
        Refused: There is no such class.
    """
    if not -classes <= number < classes:
        raise Refused(f"no {what} class {number}: the data has {classes} classes, 0 to {classes - 1}")
    return number % classes
