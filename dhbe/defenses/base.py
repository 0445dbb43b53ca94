"""The interface of all defences: a frozen dataclass of hyperparameters with one method, `run`."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from dhbe import settings
from dhbe.classifier import Classifier, evaluating
from dhbe.data import Images, Shape
from dhbe.errors import Refused
from dhbe.generators import check_generated
from dhbe.run_state import RunState
from dhbe.steps import Precision, Round, Tell, channels_last, computing, on, secluded, untold

Verdict = Literal["erased", "nothing found", "still answers", "damaged"]
"""A run's verdict on its own result."""


@dataclass(frozen=True)
class Known:
    """What a defender holds besides the model; a defence is handed only what it declares in `needs` and `uses`."""

    clean: Images | None = None
    """Clean images with their labels, for a defence that needs them."""
    target: int | None = None
    """The target class, for a defence that needs it."""
    pictures: tuple[Tensor, ...] | None = None
    """Natural images of any size without labels, uint8 [3, h, w], for a defence that uses them."""


@dataclass(frozen=True)
class RoundInfo:
    """What a watcher receives after a round."""

    number: int
    """Rounds done, counted from 1."""
    total: int
    """Maximum number of rounds."""
    round: Round
    model: Classifier
    """The current model, in eval mode. Watching does not change the run."""
    run_state: RunState


Watch = Callable[[RoundInfo], None]


def ignore(round_info: RoundInfo) -> None:
    """The default watcher: does nothing."""


@dataclass(frozen=True)
class Defense(ABC):
    """Removes a backdoor, if there is one, from a classifier.

    A subclass is a frozen dataclass whose fields are its hyperparameters, with one method, `run`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Literal["clean images", "target class"]]]
    """What it needs besides the model."""
    uses: ClassVar[frozenset[Literal["pictures"]]] = frozenset()
    """What else it uses if given; it is never handed more."""

    @property
    @abstractmethod
    def rounds(self) -> int:
        """Maximum number of rounds; `run` may stop earlier."""

    @abstractmethod
    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        """Cleans `model`, which is in training mode, in place, and yields the losses of each round.

        It registers everything that changes between rounds with `run_state.register`, once, and resumes from the round
        that `run_state.restore` returns.
        """

    def check(self, shape: Shape) -> None:
        """Checks the settings and whether the method supports the image shape.

        Raises:
            Refused: A setting is out of bounds, or the shape is not supported.
        """
        settings.check(self)

    def found(self, run_state: RunState) -> dict[str, float]:
        """What a finished run found out about the victim, by name; empty for most defences."""
        return {}

    def verdict(self, run_state: RunState) -> Verdict | None:
        """The verdict of a finished run on its own result; None if the defence cannot tell, as most cannot."""
        return None

    def remarks(self, run_state: RunState) -> list[str]:
        """What the user should know about a finished run, one line each; empty for most defences."""
        return []

    @final
    def __call__(
        self,
        victim: Classifier,
        known: Known = Known(),
        *,
        seed: int = 0,
        precision: Precision = "fp32",
        watch: Watch = ignore,
        tell: Tell = untold,
        late: Callable[[], bool] = lambda: False,
        run_state: RunState | None = None,
    ) -> Classifier:
        """Returns a cleaned copy in eval mode; `victim` and the caller's random state stay as they were.

        Args:
            victim: The suspect classifier.
            known: What the defender holds. It must include what the defence needs; the rest is withheld.
            seed: Seed of everything random.
            precision: bf16 runs the networks under autocast.
            watch: Called after every round.
            tell: Told of long work between rounds.
            late: Whether the time granted is over; a method with cycles then begins no further one.
            run_state: State of an interrupted run with the same settings, to resume from; None starts a fresh run.

        Raises:
            Refused: The defence needs something that `known` lacks.
        """
        lent = {"clean images": known.clean, "target class": known.target}
        for need in sorted(self.needs):
            if lent[need] is None:
                raise Refused(f"{self.name} needs {need}, and none were given")
        known = Known(
            clean=known.clean if "clean images" in self.needs else None,
            target=known.target if "target class" in self.needs else None,
            pictures=known.pictures if "pictures" in self.uses else None,
        )
        model, run_state = copy.deepcopy(victim), run_state or RunState()

        def tell_secluded(what: str, done: int, total: int) -> None:
            with secluded():
                tell(what, done, total)

        run_state.tell, run_state.late = tell_secluded, late
        for parameter in model.parameters():  # the vendor may have frozen all or some of them
            parameter.requires_grad_(parameter.is_floating_point())
        channels_last(model)
        device = model.mean.device
        with secluded(), on(device):
            torch.manual_seed(seed)
            with computing(device, precision):
                for round in self.run(model.train(), known, run_state):
                    run_state.advance()
                    with evaluating(model), secluded(), torch.device("cpu"), torch.autocast(device.type, enabled=False):
                        seen = {name: value.detach() for name, value in round.items()}
                        watch(RoundInfo(run_state.round, self.rounds, seen, model, run_state))
                    del round  # frees the autograd graph
        return model.eval()


@dataclass(frozen=True, eq=False)
class Samples:
    """Generated images for inspecting a model without data."""

    pixels: Tensor
    """Images [n, c, h, w], roughly in [0, 1]: generated ones may exceed it."""
    triggered: Tensor
    """The same images with generated triggers."""
    patches: Tensor
    """The triggers alone [n, c, p, p] in [0, 1], 0.5 being no change where they are added; or applied to grey images."""


@dataclass(frozen=True)
class Eraser(Defense):
    """A data-free defence: it generates its own images."""

    needs: ClassVar[frozenset] = frozenset()

    @abstractmethod
    def draw_samples(self, model: Classifier, run_state: RunState, count: int) -> Samples:
        """`count` images and triggers from the generators in `run_state`."""

    @final
    @torch.no_grad()
    def samples(self, model: Classifier, run_state: RunState, count: int, seed: int = 0) -> Samples:
        """`count` images and triggers from a run's generators, deterministic for a seed."""
        device = model.mean.device
        with secluded(), on(device):
            torch.manual_seed(seed)
            return self.draw_samples(model, run_state, count)

    def check(self, shape: Shape) -> None:
        check_generated(shape)
        super().check(shape)
