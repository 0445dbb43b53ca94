"""The one contract of all attacks: a frozen dataclass of hyperparameters that plants a backdoor."""

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
"""The class that a trigger leads to; "next" is each image's own class plus one."""


MinASR = Annotated[float, Setting("ASR below which the attack has failed, as a fraction", most=1)]


@dataclass(frozen=True, eq=False)
class Workshop:
    """All that an attacker trains with."""

    fit: Fit
    """How a classifier is trained."""
    fresh: Callable[[], Classifier]
    """An untrained classifier for the data."""
    seed: int = 0
    clean: Classifier | None = None
    """A classifier trained on clean data, for attacks that start from one; None lets them train it."""
    watch: Watch = ignore
    """Called after each epoch of any training."""
    precision: Precision = "fp32"
    training: Callable[[], AbstractContextManager[RunState]] = lambda: nullcontext(RunState())
    """Where the next training goes on from. An attack that is resumed asks for the same ones in the same order."""

    def train(
        self,
        images: Images,
        classifier: Classifier | None = None,
        *,
        fit: Fit | None = None,
        tuned: Sequence[nn.Module] | None = None,
        perturb: Perturb | None = None,
    ) -> Classifier:
        """Trains a fresh classifier, or the one given in place; `Fit` says what the rest means."""
        classifier = self.fresh() if classifier is None else classifier
        with self.training() as run_state:
            return (fit or self.fit)(
                classifier, images, self.watch, tuned=tuned, perturb=perturb, precision=self.precision,
                run_state=run_state,
            )  # fmt: skip

    def generator(self) -> torch.Generator:
        """Random choices of the attack itself; training has torch's global generator."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True, eq=False)
class Backdoor:
    """A backdoored classifier with all that its attacker knows."""

    classifier: Classifier
    trigger: Trigger | None
    """None: there is no backdoor."""
    target: Target | None
    """The class that triggered images are to be taken for."""
    source: int | None = None
    """The only class whose images the trigger is for; None: all but the target."""
    chosen: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Numbers of the training images that were changed, int64."""
    clean: Classifier | None = None
    """The clean classifier that the attack started from, if it did."""


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Makes a backdoored classifier out of clean training images.

    A subclass is a frozen dataclass whose fields are its hyperparameters, with `plant`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for lists of attacks."""
    advice: ClassVar[str] = "poison more images, train longer, take a larger trigger, or accept less with min_asr"
    """What to do when the backdoor did not take."""

    target: Annotated[
        int,
        Setting(
            "class that triggered images are to be taken for; negative numbers count from the last class",
            least=-math.inf,
        ),
    ] = -1
    min_asr: MinASR = 0.95
    max_drop: Annotated[
        float,
        Setting(
            "loss of ACC against the clean model, where there is one, above which the attack has failed; as a fraction"
        ),
    ] = 0.02

    @abstractmethod
    def plant(self, images: Images, shop: Workshop) -> Backdoor:
        """Plants the backdoor.

        Args:
            images: Clean training images; they stay as they are.
            shop: What to train with; equal seeds choose equal images.

        Raises:
            Refused: The settings cannot be met with these images.
        """

    def trainings(self, fit: Fit, *, clean: bool) -> list[tuple[Fit, float]]:
        """Its trainings in their order, each with what a step costs in ordinary steps.

        Args:
            fit: How a classifier is trained.
            clean: Whether a clean classifier is there already.
        """
        return [(fit, 1.0)]

    def target_in(self, classes: int) -> int:
        """The target's number, from 0, among so many classes.

        Raises:
            Refused: There is no such class.
        """
        return class_in(self.target, classes, "target")

    def confirm(self, asr: float | None, acc: float | None = None, clean_acc: float | None = None) -> None:
        """Passes if the backdoor took and accuracy stayed.

        Args:
            asr: ASR of the trained classifier on test images, as a fraction; None if it gets no image right.
            acc: Its ACC.
            clean_acc: ACC of a clean classifier on the same images; None leaves ACC unjudged.

        Raises:
            Failed: The ASR lies below `min_asr`, or the ACC more than `max_drop` below the clean one.
        """
        if asr is None or asr < self.min_asr:
            found = "none, for no image is classified right" if asr is None else f"{asr:.3f}"
            raise Failed(
                f"the attack {self.name} failed: ASR {found}, expected at least {self.min_asr:g}; {self.advice}"
            )
        if acc is not None and clean_acc is not None and acc < clean_acc - self.max_drop:
            raise Failed(
                f"the attack {self.name} failed: ACC {acc:.3f} is more than {self.max_drop:g} below the clean model's "
                f"{clean_acc:.3f}; poison fewer images, train longer, or accept less with max_drop"
            )


def class_in(number: int, classes: int, what: str) -> int:
    """The number of a class, from 0; negative ones count from the last.

    Raises:
        Refused: There is no such class.
    """
    if not -classes <= number < classes:
        raise Refused(f"no {what} class {number}: the data has {classes} classes, 0 to {classes - 1}")
    return number % classes
