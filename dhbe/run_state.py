"""The state that a resumed run needs: its parts, the number of rounds done, and the random states."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dhbe.errors import Refused
from dhbe.steps import Tell, untold


class Stateful(Protocol):
    """Anything that can be saved and restored, such as a module or an optimiser."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Plain:
    """A part whose state is its attributes: numbers, tensors, and dicts of tensors."""

    def state_dict(self) -> dict[str, Any]:
        """All attributes by name."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores saved attributes; tensors are moved to the device of those that they replace.

        Raises:
            KeyError: An attribute is missing.
        """
        for name, old in vars(self).items():
            vars(self)[name] = _like(state_dict[name], old)


def _like(new: Any, old: Any) -> Any:
    if isinstance(old, Tensor):
        return new.to(old.device)
    return {name: _like(new[name], value) for name, value in old.items()} if isinstance(old, dict) else new


class RunState:
    """The state of a run, from which it can resume.

    A run registers its parts once, restores them, and may release those that no later round needs.

    Args:
        saved: What `state` returned in the interrupted run; None for a fresh run.
    """

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        self._saved = saved
        self._parts: dict[str, Stateful] = {}
        self._released: list[str] = []
        self._random: dict[str, Tensor] = {}
        self.round = 0
        self.tell: Tell = untold
        """Is told of long work between rounds; no part of the saved state."""
        self.late: Callable[[], bool] = lambda: False
        """Whether the time granted is over, so that no further cycle is to begin; no part of the saved state either."""

    def register(self, **parts: Stateful) -> None:
        """Names everything that changes between rounds."""
        self._parts = parts

    def restore(self) -> int:
        """Restores the parts and the random states of the saved run; does nothing in a fresh run.

        Returns:
            The number of rounds already done.

        Raises:
            Refused: The saved parts do not match those that were registered.
        """
        if self._saved is not None:
            saved = self._saved["parts"]
            self.release(*self._saved["released"])
            if odd := sorted(saved.keys() ^ self._parts.keys()):
                raise Refused(
                    f"the saved run has other parts than this one ({', '.join(odd)}): start over with --overwrite"
                )
            for name, part in self._parts.items():
                try:
                    part.load_state_dict(saved[name])
                except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
                    raise Refused(
                        f"{name} of the saved run does not fit this one: start over with --overwrite"
                    ) from error
            self.round, self._random = self._saved["round"], self._saved["random"]
            torch.set_rng_state(self._random["cpu"])
            if "cuda" in self._random:
                torch.cuda.set_rng_state(self._random["cuda"])
        return self.round

    def release(self, *names: str) -> None:
        """Drops parts that no later round needs; states saved from now on lack them."""
        self._released = sorted({*self._released, *names})
        self._parts = {name: part for name, part in self._parts.items() if name not in names}

    def part(self, name: str) -> Any:
        """One of the parts of the run."""
        return self._parts[name]

    def advance(self) -> None:
        """Ends a round and records the random states, before a watcher may change them."""
        self.round += 1
        self._random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            self._random["cuda"] = torch.cuda.get_rng_state()

    def state(self) -> dict[str, Any]:
        """The whole state as plain containers and tensors, for `torch.save`."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return {"round": self.round, "parts": parts, "released": self._released, "random": self._random}
