"""The one contract of all defences: a frozen dataclass of hyperparameters and one `run`."""

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
from dhbe.steps import Precision, Round, channels_last, computing, on, secluded

Verdict = Literal["erased", "nothing found", "still answers", "damaged"]
"""What a run says of its own result."""


@dataclass(frozen=True)
class Known:
    """All that a defender may look at besides the model: nothing, unless the defence says it needs more."""

    clean: Images | None = None
    """Clean images with their labels, for a defence that needs them."""
    target: int | None = None
    """The target class, for a defence that needs it."""


@dataclass(frozen=True)
class RoundInfo:
    """What a watcher sees after a round."""

    number: int
    """Rounds done, from 1."""
    total: int
    """Rounds that the defence will take at the most."""
    round: Round
    model: Classifier
    """The model at this moment, in eval mode. Looking does not change the run."""
    run_state: RunState


Watch = Callable[[RoundInfo], None]


def ignore(round_info: RoundInfo) -> None:
    """The watcher that does not look."""


@dataclass(frozen=True)
class Defense(ABC):
    """Turns a classifier that may be backdoored into one that should not be.

    A subclass is a frozen dataclass whose fields are its hyperparameters, and one method, `run`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Literal["clean images", "target class"]]]
    """What it must be handed besides the model; it is never handed more."""

    @property
    @abstractmethod
    def rounds(self) -> int:
        """How many rounds `run` takes at the most; it may see that it can stop before."""

    @abstractmethod
    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        """Cleans `model`, which is in training mode, in place, and yields what each round came to.

        It registers all that changes between rounds with `run_state.register`, once, and goes on from where
        `run_state.restore` has put it.
        """

    def check(self, shape: Shape) -> None:
        """Refuses images and settings that the method is not made for.

        Raises:
            Refused: With what is wrong.
        """
        settings.check(self)

    def found(self, run_state: RunState) -> dict[str, float]:
        """What a finished run tells of the victim, by name, beside the cleaned model; most tell nothing."""
        return {}

    def verdict(self, run_state: RunState) -> Verdict | None:
        """What a finished run says of its own result; None where it cannot tell, as most cannot."""
        return None

    def remarks(self, run_state: RunState) -> list[str]:
        """What the user of a finished run should know of it, in lines; most have nothing to say."""
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
        run_state: RunState | None = None,
    ) -> Classifier:
        """Returns a cleaned copy in eval mode; `victim` and the caller's random state stay as they were.

        Args:
            victim: The suspect classifier.
            known: What the defender holds. It must hold what the defence needs; the rest is withheld.
            seed: Seed of everything random.
            precision: bf16 runs the networks under autocast.
            watch: Called after every round.
            run_state: Of an interrupted run of the same settings, to go on from; None starts a fresh one.

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
        )
        model, run_state = copy.deepcopy(victim), run_state or RunState()
        for parameter in model.parameters():  # a network that was frozen for use, or in part for training, learns again
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
                    del round  # and with it what its graph holds
        return model.eval()


@dataclass(frozen=True, eq=False)
class Samples:
    """Generated images, on which a model can be looked at without data."""

    pixels: Tensor
    """Images [n, c, h, w], in [0, 1] or around it, as the method draws them."""
    triggered: Tensor
    """The same images with generated triggers."""
    patches: Tensor
    """The triggers alone [n, c, p, p] in [0, 1], or laid on grey images; where they are added, 0.5 is no change."""


@dataclass(frozen=True)
class Eraser(Defense):
    """A defence that makes its own images, and so needs nothing."""

    needs: ClassVar[frozenset] = frozenset()

    @abstractmethod
    def draw_samples(self, model: Classifier, run_state: RunState, count: int) -> Samples:
        """So many images and triggers of the generators in `run_state`."""

    @final
    @torch.no_grad()
    def samples(self, model: Classifier, run_state: RunState, count: int, seed: int = 0) -> Samples:
        """Images and triggers of a run's generators, always the same for a seed."""
        device = model.mean.device
        with secluded(), on(device):
            torch.manual_seed(seed)
            return self.draw_samples(model, run_state, count)

    def check(self, shape: Shape) -> None:
        check_generated(shape)
        super().check(shape)
