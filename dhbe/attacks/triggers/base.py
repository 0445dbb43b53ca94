"""The interface of all triggers, which turn clean images into triggered ones."""

import io
import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from dhbe.data import Shape
from dhbe.errors import Refused

HEADER = "trigger"
"""Name of the array in .npz files of dhbe that holds, as JSON text, the parts of a trigger that are not arrays."""


class Trigger(ABC):
    """A change to images that makes a backdoored classifier predict the target class.

    A subclass is a frozen dataclass. It implements the transformations that make sense for it.
    """

    kind: ClassVar[str]
    """Name of the kind in files."""
    arrays: ClassVar[tuple[str, ...]]
    """Which parts of `content` are float tensors."""
    name: str
    """Name of this trigger in reports; for a trigger made by `parse`, the text that makes it again."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Shape (c, h, w) of the images it fits."""

    @abstractmethod
    def apply(self, pixels: Tensor) -> Tensor:
        """Triggered copies of pixels with the right shape; see `__call__`."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Everything that `from_content` needs besides name and shape: JSON values, and tensors as listed in `arrays`."""

    @classmethod
    @abstractmethod
    def from_content(cls, content: dict[str, Any], shape: Shape) -> Self:
        """The inverse of `content`, for images of `shape`; the content may be malformed."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Triggered copies of pixels [n, c, h, w] in [0, 1]: same shape and range, differentiable.

        Raises:
            Refused: The shape of the images does not match the trigger's.
        """
        if tuple(pixels.shape[1:]) != self.shape:
            raise Refused(f"trigger {self.name} fits images {self.shape}, not {tuple(pixels.shape[1:])}")
        return self.apply(pixels)

    def amplified(self, copies: Literal[1, 4, 9]) -> "Trigger | None":
        """The trigger repeated in several positions (section 5.3); None if not supported."""
        return self if copies == 1 else None

    def faded(self, opacity: float) -> "Trigger | None":
        """The trigger with its effect scaled: weaker below 1, stronger above; None if not supported.

        Raises:
            Refused: The factor is out of range.
        """
        return None

    def resized(self, factor: float) -> "Trigger | None":
        """The trigger scaled in height and width by a factor; None if not supported."""
        return None

    def moved(self, place: str | tuple[int, int]) -> "Trigger | None":
        """The trigger at another position; None if not supported."""
        return None

    def to_json(self) -> str:
        """The trigger as a JSON object that `from_json` restores exactly."""
        return json.dumps({**self._head(), **self._arrays(lambda tensor: tensor.tolist())})

    def to_npz(self) -> bytes:
        """The trigger as an .npz file that `parse` restores exactly: its arrays, and a JSON text for the rest."""
        stream = io.BytesIO()
        np.savez(stream, **{HEADER: np.array(json.dumps(self._head()))}, **self._arrays(lambda tensor: tensor.numpy()))
        return stream.getvalue()

    def _head(self) -> dict[str, Any]:
        plain = {key: value for key, value in self.content().items() if key not in self.arrays}
        return {"kind": self.kind, "name": self.name, "shape": self.shape, **plain}

    def _arrays(self, convert: Any) -> dict[str, Any]:
        return {key: convert(self.content()[key].contiguous()) for key in self.arrays}


def floats(content: dict[str, Any], key: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """The float tensor under `key`, given as nested lists or as an array.

    Raises:
        Refused: It has the wrong shape, or is not finite.
    """
    with np.errstate(over="ignore"):  # overflow to infinity is refused below
        tensor = torch.tensor(np.array(content[key], dtype=np.float64).astype(np.float32))
    if shape is not None and tensor.shape != shape:
        raise Refused(f"the trigger's {key} is {list(tensor.shape)}, not {list(shape)}")
    if not tensor.isfinite().all():
        raise Refused(f"the trigger's {key} is not finite")
    return tensor


def check_share(name: str, share: float, most: float = 1.0) -> None:
    """Raises `Refused` unless a share lies in (0, most]."""
    if not 0 < share <= most:  # NaN too
        raise Refused(f"trigger {name}: an opacity of {share:g} is not above 0 and at most {most:g}")


def short(number: float) -> str:
    """The shortest text that represents a number exactly.

    >>> short(20.0), short(0.1)
    ('20', '0.1')
    """
    return repr(float(number)).removesuffix(".0")
