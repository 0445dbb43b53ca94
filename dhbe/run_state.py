"""What a resumed run needs: its parts, how many rounds it has done, and the random states."""

from typing import Any, Protocol

import torch
from torch import Tensor

from dhbe.errors import Refused


class Stateful(Protocol):
    """Whatever can be saved and restored: a module, an optimiser."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Plain:
    """A part whose state is its attributes: numbers, tensors, and dicts of tensors."""

    def state_dict(self) -> dict[str, Any]:
        """All attributes by name."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes saved attributes over; tensors go where those that they replace lie, not where they were read to.

        Raises:
            KeyError: One is missing.
        """
        for name, old in vars(self).items():
            vars(self)[name] = _like(state_dict[name], old)


def _like(new: Any, old: Any) -> Any:
    if isinstance(old, Tensor):
        return new.to(old.device)
    return {name: _like(new[name], value) for name, value in old.items()} if isinstance(old, dict) else new


class RunState:
    """What an interrupted run needs in order to go on.

    A run registers its parts once, restores them, and may release those that no later round needs.

    Args:
        saved: What `state` returned in the run to be continued; None for a fresh run.
    """

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        self._saved = saved
        self._parts: dict[str, Stateful] = {}
        self._released: list[str] = []
        self._random: dict[str, Tensor] = {}
        self.round = 0

    def register(self, **parts: Stateful) -> None:
        """Names everything that changes between rounds."""
        self._parts = parts

    def restore(self) -> int:
        """Puts the parts and the random states back to where the saved run was; a fresh run stays as it is.

        Returns:
            The rounds already done.

        Raises:
            Refused: What was saved has other parts than those that were registered.
        """
        if self._saved is not None:
            saved = self._saved["parts"]
            self.release(*self._saved["released"])
            if odd := sorted(saved.keys() ^ self._parts.keys()):
                raise Refused(
                    f"the saved run has other parts than this one ({', '.join(odd)}): begin anew with --overwrite"
                )
            for name, part in self._parts.items():
                try:
                    part.load_state_dict(saved[name])
                except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
                    raise Refused(
                        f"{name} of the saved run does not fit this one: begin anew with --overwrite"
                    ) from error
            self.round, self._random = self._saved["round"], self._saved["random"]
            torch.set_rng_state(self._random["cpu"])
            if "cuda" in self._random:
                torch.cuda.set_rng_state(self._random["cuda"])
        return self.round

    def release(self, *names: str) -> None:
        """Lets go of parts that no later round needs; what is saved from now on lacks them."""
        self._released = sorted({*self._released, *names})
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
        return {"round": self.round, "parts": parts, "released": self._released, "random": self._random}
