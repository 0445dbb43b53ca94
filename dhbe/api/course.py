"""The course of a defence's run, saved at intervals, and the schema that a saved one must have."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from dhbe import runs, state_file
from dhbe.api import halving
from dhbe.defenses import RoundInfo
from dhbe.errors import Failed
from dhbe.run_state import RunState

Watch = Callable[[RoundInfo], None]


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

    def __init__(self, held: runs.Run | None, watch: Watch, rounds: int) -> None:
        saved = held.saved if held else None
        if held and saved and (wrong := fault(saved, rounds)):
            raise state_file.unusable(held.folder / runs.CHECKPOINT, wrong)
        self.curve: list[dict[str, float]] = saved["curve"] if saved else []
        self.run_state = RunState(saved["run_state"] if saved else None)
        self.halvings: int = saved["halvings"] if saved else 0
        """How often the batch was halved because memory ran out."""
        self._spent = saved["seconds"] if saved else 0.0
        self._began = time.monotonic()
        self._held, self._watch = held, watch

    def seconds(self) -> float:
        return self._spent + time.monotonic() - self._began

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Attributes any error before the first round after resuming to the saved state.

        Raises:
            Refused: The defence cannot resume from that state.
        """
        with self._held.going_on() if self._held else nullcontext():
            yield

    def look(self, round_info: RoundInfo) -> None:
        """Called after each round of the defence."""
        if self._held:
            self._held.restored = None
        self.curve.append({"iteration": round_info.number, **{name: float(x) for name, x in round_info.round.items()}})
        _check_finite(self.curve[-1])
        self._watch(round_info)
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


def fault(saved: Mapping[str, Any], rounds: int) -> str | None:
    """What is wrong with the saved state of a defence of `rounds` rounds; None if nothing is."""
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
