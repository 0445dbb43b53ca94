"""The course of a run or a search, saved at intervals, and the schema that a saved one must have."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from dhbe import runs, state_file
from dhbe.api import halving
from dhbe.defenses import PEERS
from dhbe.errors import Failed
from dhbe.records import ModelInfo
from dhbe.run_state import RunState
from dhbe.steps import Round


class SavedRounds(BaseModel):
    """Schema of what `RunState.state` returns."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    round: Annotated[int, Field(ge=0)]
    parts: dict[str, dict[Any, Any]]
    released: list[str]
    random: dict[str, Tensor]

    @model_validator(mode="after")
    def _check_random(self) -> Self:
        random, now = self.random.get("cpu"), torch.get_rng_state()
        if self.round and (random is None or random.dtype != now.dtype or random.shape != now.shape):
            raise ValueError("its random state is not torch's")
        return self


class _SavedCourse(BaseModel):
    """Schema of the state that `Course` saves."""

    model_config = ConfigDict(allow_inf_nan=False)

    run_state: SavedRounds
    curve: list[dict[str, int | float]]
    seconds: Annotated[float, Field(ge=0)]
    halvings: Annotated[int, Field(ge=0, le=halving.HALVINGS)]


class Course:
    """Progress of a run, saved in its folder so that an interrupted run can resume."""

    def __init__(self, held: runs.Run | None, rounds: int) -> None:
        saved = held.saved if held else None
        if held and saved and (wrong := fault(saved, rounds)):
            raise state_file.unusable(held.folder / runs.CHECKPOINT, wrong)
        self.curve: list[dict[str, float]] = saved["curve"] if saved else []
        self.run_state = RunState(saved["run_state"] if saved else None)
        self.halvings: int = saved["halvings"] if saved else 0
        """How often the batch was halved because memory ran out."""
        self._spent = saved["seconds"] if saved else 0.0
        self._began = time.monotonic()
        self._held = held

    def seconds(self) -> float:
        return self._spent + time.monotonic() - self._began

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Attributes any error before the first round after resuming to the saved state.

        Raises:
            Refused: The run cannot resume from that state.
        """
        with self._held.going_on() if self._held else nullcontext():
            yield

    def add(self, number: int, round: Round) -> None:
        """Records the losses of a round, counted from 1.

        Raises:
            Failed: One of them is not finite.
        """
        if self._held:
            self._held.restored = None
        self.curve.append({"iteration": number, **{name: float(x.detach()) for name, x in round.items()}})
        _check_finite(self.curve[-1])

    def keep(self) -> None:
        """Saves the state if it is time to; called after each round."""
        if self._held:
            self._held.keep(self._state)

    def anew(self) -> None:
        """Discards all rounds, but not the time that they took, to restart with half the batch."""
        self.curve.clear()
        self.run_state = RunState()
        self.halvings += 1

    def end(self) -> None:
        """Saves the last state regardless of the interval, as what follows may fail."""
        if self._held:
            self._held.keep(self._state, last=True)

    def _state(self) -> dict[str, Any]:
        told = {"curve": self.curve, "seconds": self.seconds(), "halvings": self.halvings}
        return {"run_state": self.run_state.state(), **told}


def identity(info: ModelInfo) -> dict[str, Any]:
    """Which model this is, and how it is used."""
    own = info.model_dump(include={"sha256", "arch", "classes", "input", "mean", "std"})
    return own | info.model_dump(include={"weights", "output"}, exclude_none=True)


def asked(info: ModelInfo, defense: Mapping[str, Any], seed: int, precision: str) -> dict[str, Any]:
    """Everything that the result of a run depends on, except the device.

    Args:
        info: The suspect model.
        defense: What the record says of the defence: its name, and hyperparameters.
        seed: The seed.
        precision: The precision of the computation.
    """
    halved = {name.removeprefix("asked_"): value for name, value in defense.items() if name.startswith("asked_")}
    unlike = ["name", "preset"] if defense["name"] not in PEERS else []  # a preset equals its settings given by hand
    of_defense = {
        name: value for name, value in defense.items() if name not in unlike and "asked_" not in name
    } | halved
    return {**identity(info), **of_defense, "seed": seed, "precision": precision}


def fault(saved: Mapping[str, Any], rounds: int) -> str | None:
    """What is wrong with the saved state of a run of `rounds` rounds; None if nothing is."""
    if wrong := misfit(saved, _SavedCourse):
        return wrong
    done = saved["run_state"]["round"]
    if done > rounds or [point.get("iteration") for point in saved["curve"]] != [*range(1, done + 1)]:
        return f"its curve does not match the {done} of {rounds} rounds that it claims are done"
    return None


def misfit(saved: Mapping[str, Any], form: type[BaseModel]) -> str | None:
    """How a saved state violates its schema; None if it does not."""
    try:
        form.model_validate(dict(saved), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None


def _check_finite(point: dict[str, float]) -> None:
    if broken := [name for name, x in point.items() if x - x != 0]:
        raise Failed(
            f"the run diverged in round {point['iteration']} ({', '.join(broken)}): lower --lr, or try another --seed"
        )
