"""The one contract of all defences: a frozen dataclass of hyperparameters and one `run`."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, final

import torch
from torch import Tensor

from dhbe.classifier import Classifier, evaluating
from dhbe.data import Images, Shape
from dhbe.defenses.parts import channels_last
from dhbe.errors import Refused

SMALLEST_SIDE = 8
"""Pixels; below, the generators have nothing to double."""

LEAST = {
    "iterations": 1, "warm_up": 1, "student_steps": 1, "batch": 4, "patch": 1, "album": 1, "epochs": 1, "size": 1,
    "search_epochs": 1, "search_size": 1, "search_batch": 1, "teacher_epochs": 1, "steps": 1, "batches": 1,
    "cycles": 1,
}  # fmt: skip
"""Settings that count something that cannot be missing. Half a batch of 1 px patches must still have a variance."""

Precision = Literal["fp32", "bf16"]
"""What networks compute in."""

Round = dict[str, Tensor]
"""What one round came to: scalars by name. They stay on the device until somebody looks."""


@dataclass(frozen=True)
class Known:
    """All that a defender may look at besides the model: nothing, unless the defence says it needs more."""

    clean: Images | None = None
    """Clean images with their labels, for a defence that needs them."""
    target: int | None = None
    """The target class, for a defence that needs it."""


class Stateful(Protocol):
    """Whatever can be saved and restored: a module, an optimiser."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Ledger:
    """What an interrupted run needs in order to go on: its parts, its round and the random states.

    Args:
        saved: What `state` returned in the run to be continued; None for a fresh run.
    """

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        self._saved = saved
        self._parts: dict[str, Stateful] = {}
        self._random: dict[str, Tensor] = {}
        self.round = 0

    def keep(self, **parts: Stateful) -> int:
        """Registers the parts of a run, restores them if the run goes on, and returns the rounds already done."""
        self._parts = parts
        if self._saved is not None:
            self.drop(*(parts.keys() - self._saved["parts"].keys()))
            for name, part in self._parts.items():
                part.load_state_dict(self._saved["parts"][name])
            self.round, self._random = self._saved["round"], self._saved["random"]
            torch.set_rng_state(self._random["cpu"])
            if "cuda" in self._random:
                torch.cuda.set_rng_state(self._random["cuda"])
        return self.round

    def drop(self, *names: str) -> None:
        """Lets go of parts that no later round needs."""
        self._parts = {name: part for name, part in self._parts.items() if name not in names}

    def part(self, name: str) -> Any:
        """One of the parts of the run."""
        return self._parts[name]

    def advance(self) -> None:
        """Closes a round. The random states are noted here, before anybody looks and draws."""
        self.round += 1
        self._random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            self._random["cuda"] = torch.cuda.get_rng_state()

    def state(self) -> dict[str, Any]:
        """Everything as plain containers and tensors, to be saved with `torch.save`."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return {"round": self.round, "parts": parts, "random": self._random}


@dataclass(frozen=True)
class Glimpse:
    """What a watcher sees after a round."""

    number: int
    """Rounds done, from 1."""
    total: int
    """Rounds that the defence will take at the most."""
    round: Round
    model: Classifier
    """The model at this moment, in eval mode. Looking does not change the run."""
    ledger: Ledger


Watch = Callable[[Glimpse], None]


def ignore(glimpse: Glimpse) -> None:
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
    def run(self, model: Classifier, known: Known, ledger: Ledger) -> Iterator[Round]:
        """Cleans `model`, which is in training mode, in place, and yields what each round came to.

        It calls `ledger.keep` once, with all that changes between rounds, and starts at the round this returns.
        """

    def check(self, shape: Shape) -> None:
        """Refuses images and settings that the method is not made for.

        Raises:
            Refused: With what is wrong.
        """
        for name, value in vars(self).items():
            least = LEAST.get(name, 0)
            if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value < math.inf:
                raise Refused(f"--{name.replace('_', '-')} {value}: it must be a number of at least {least}")

    def found(self, ledger: Ledger) -> dict[str, float]:
        """What a finished run tells of the victim, by name, beside the cleaned model; most tell nothing."""
        return {}

    @final
    def __call__(
        self,
        victim: Classifier,
        known: Known = Known(),
        *,
        seed: int = 0,
        precision: Precision = "fp32",
        watch: Watch = ignore,
        ledger: Ledger | None = None,
    ) -> Classifier:
        """Returns a cleaned copy in eval mode; `victim` and the caller's random state stay as they were.

        Args:
            victim: The suspect classifier.
            known: What the defender holds. It must hold what the defence needs; the rest is withheld.
            seed: Seed of everything random.
            precision: bf16 runs the networks under autocast.
            watch: Called after every round.
            ledger: Of an interrupted run of the same settings, to go on from; None starts a fresh one.

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
        model, ledger = copy.deepcopy(victim), ledger or Ledger()
        for parameter in model.parameters():  # a network that was frozen for use, or in part for training, learns again
            parameter.requires_grad_(parameter.is_floating_point())
        channels_last(model)
        device = model.mean.device
        with secluded(), on(device):
            torch.manual_seed(seed)
            with computing(device, precision):
                for round in self.run(model.train(), known, ledger):
                    ledger.advance()
                    with evaluating(model), secluded(), torch.device("cpu"), torch.autocast(device.type, enabled=False):
                        seen = {name: value.detach() for name, value in round.items()}
                        watch(Glimpse(ledger.round, self.rounds, seen, model, ledger))
                    del round  # and with it what its graph holds
        return model.eval()


@dataclass(frozen=True, eq=False)
class Scene:
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

    patch: Annotated[int, "side of the generated triggers in pixels (p)"] = 5

    @abstractmethod
    def draw_scene(self, model: Classifier, ledger: Ledger, count: int) -> Scene:
        """So many images and triggers of the generators in `ledger`."""

    @final
    @torch.no_grad()
    def scene(self, model: Classifier, ledger: Ledger, count: int, seed: int = 0) -> Scene:
        """Images and triggers of a run's generators, always the same for a seed."""
        device = model.mean.device
        with secluded(), on(device):
            torch.manual_seed(seed)
            return self.draw_scene(model, ledger, count)

    def check(self, shape: Shape) -> None:
        check_generated(shape)
        if not 1 <= self.patch <= shape[1]:
            raise Refused(f"--patch {self.patch}: a trigger must have 1 to {shape[1]} px to fit into the images")
        super().check(shape)


def check_generated(shape: Shape) -> None:
    """Refuses shapes of images that the generators cannot make.

    Raises:
        Refused: They are not square, too small, or have neither 1 nor 3 channels.
    """
    channels, height, width = shape
    if height != width or height < SMALLEST_SIDE or channels not in (1, 3):
        raise Refused(
            f"--input {channels}x{height}x{width}: images are made square, of {SMALLEST_SIDE} px or more, "
            "with 1 or 3 channels"
        )


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Tensors are made there; of several GPUs it is the current one, whose random state and streams are meant."""
    with torch.device(device), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def secluded() -> AbstractContextManager[None]:
    """Gives the caller's random states back afterwards; those of all GPUs, for `torch.manual_seed` is for all."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else [])


def computing(device: torch.device, precision: Precision) -> torch.autocast:
    """The networks inside compute in this precision.

    Autocast goes without its cache, which outlives a step and would go on answering with the weights of the first one.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
