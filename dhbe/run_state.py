"""What a resumed run needs: its parts, its round and the random states."""

from typing import Any, Protocol

import torch
from torch import Tensor


class Stateful(Protocol):
    """Whatever can be saved and restored: a module, an optimiser."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class RunState:
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
