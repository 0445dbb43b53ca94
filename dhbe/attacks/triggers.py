"""Triggers: values that turn clean images into triggered ones."""

import json
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dhbe.data import Shape, read_pack
from dhbe.errors import Refused

Mode = Literal["replace", "add"]
Style = Literal["checkerboard", "checkerboard2", "white"]

PLACES = {
    "top-left": (0, 0),
    "top": (0, 1),
    "top-right": (0, 2),
    "left": (1, 0),
    "center": (1, 1),
    "right": (1, 2),
    "bottom-left": (2, 0),
    "bottom": (2, 1),
    "bottom-right": (2, 2),
}
"""Places of a patch, in halves of the room that it leaves below and to the right."""

CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")

EXISTING = "badnets:SIDE[:STYLE[:PLACE]], an .npz file with pattern and mask, or a .json file written by dhbe"
"""What `parse` reads, for messages."""

LARGEST_JSON = 64 * 2**20
"""Bytes; a trigger over a whole image of 512 x 512 pixels stays below."""


class Trigger(ABC):
    """A change that makes a backdoored classifier answer with the attacker's class."""

    kind: ClassVar[str]
    """Name of the kind in a .json file."""
    name: str
    """Name of this trigger in reports."""

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """Triggered copies of pixels [n, c, h, w] in [0, 1]: same shape and range, differentiable."""

    @abstractmethod
    def amplified(self, copies: Literal[1, 4, 9]) -> "Trigger | None":
        """The trigger several times over (section 5.3); None if it has no such form."""

    @abstractmethod
    def to_json(self) -> str:
        """The trigger as a JSON object that `from_json` restores exactly."""


@dataclass(frozen=True, eq=False)
class Patch(Trigger):
    """A pattern laid on a part of every image, always at the same place.

    Args:
        pattern: float [c, h, w], as large as the image; in [0, 1], or in [-1, 1] in mode "add". Values that the mask
            hides are set to 0.
        mask: float [c, h, w] in [0, 1], how strongly the pattern shows.
        mode: "replace" gives (1 - mask) x + mask pattern, "add" clips x + mask pattern to [0, 1].
        name: Name in reports.

    Raises:
        Refused: Wrong shapes or values, or a mask that hides everything.
    """

    kind: ClassVar[str] = "patch"

    pattern: Tensor
    mask: Tensor
    mode: Mode = "replace"
    name: str = "patch"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise Refused(f"trigger {self.name}: no mode {self.mode!r}; there are {', '.join(get_args(Mode))}")
        if self.pattern.ndim != 3 or self.mask.shape != self.pattern.shape:
            shapes = f"{list(self.pattern.shape)} and {list(self.mask.shape)}"
            raise Refused(f"trigger {self.name}: pattern and mask must both be [c, h, w], not {shapes}")
        lowest = -1 if self.mode == "add" else 0
        # Written so that NaN fails too.
        if not ((self.pattern >= lowest) & (self.pattern <= 1)).all():
            raise Refused(f"trigger {self.name}: the pattern must lie in [{lowest}, 1]")
        if not ((self.mask >= 0) & (self.mask <= 1)).all() or not self.mask.any():
            raise Refused(f"trigger {self.name}: the mask must lie in [0, 1] and show something; divide 0..255 by 255")
        mask = self.mask.float()
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "pattern", self.pattern.float() * (mask > 0))

    @property
    def shape(self) -> Shape:
        """Shape (c, h, w) of the images it fits."""
        c, h, w = self.mask.shape
        return c, h, w

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the smallest box around all that the mask shows."""
        shown = self.mask.amax(0) > 0
        rows, columns = shown.any(1).nonzero().flatten(), shown.any(0).nonzero().flatten()
        return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Triggered copies of pixels [n, c, h, w] in [0, 1].

        Raises:
            Refused: The images have another shape than the trigger.
        """
        if pixels.shape[1:] != self.mask.shape:
            raise Refused(f"trigger {self.name} fits images {self.shape}, not {tuple(pixels.shape[1:])}")
        pattern, mask = self.pattern.to(pixels), self.mask.to(pixels)
        if self.mode == "add":
            return (pixels + mask * pattern).clamp(0, 1)
        return (1 - mask) * pixels + mask * pattern

    def amplified(self, copies: Literal[1, 4, 9]) -> "Patch | None":
        """The patch also in the four corners (4), plus the centre and the middle of each edge (9).

        Its own place always keeps it, so a patch that lies elsewhere is there once more. None if it is higher or wider
        than half the image.
        """
        if copies == 1:
            return self
        rows, columns = self.box
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if 2 * height > self.shape[1] or 2 * width > self.shape[2]:
            return None
        pattern, mask = torch.zeros_like(self.pattern), torch.zeros_like(self.mask)
        offsets = [_offset(place, (height, width), self.shape) for place in (CORNERS if copies == 4 else PLACES)]
        for top, left in [*offsets, (rows.start, columns.start)]:  # its own place last, so that it stays whole
            there = slice(None), slice(top, top + height), slice(left, left + width)
            shown = self.mask[:, rows, columns] > 0
            pattern[there] = torch.where(shown, self.pattern[:, rows, columns], pattern[there])
            mask[there] = torch.where(shown, self.mask[:, rows, columns], mask[there])
        return Patch(pattern, mask, self.mode, f"{self.name} x{copies}")

    def to_json(self) -> str:
        """The trigger as a JSON object: its box of the pattern and of the mask, and where it lies."""
        rows, columns = self.box
        content = {
            "kind": self.kind,
            "name": self.name,
            "mode": self.mode,
            "shape": self.shape,
            "place": (rows.start, columns.start),
            "pattern": self.pattern[:, rows, columns].tolist(),
            "mask": self.mask[:, rows, columns].tolist(),
        }
        return json.dumps(content)

    @classmethod
    def from_dict(cls, content: dict[str, Any], shape: Shape) -> "Patch":
        """The inverse of `to_json`, for images of `shape`; anything may be in `content`."""
        if content["shape"] != list(shape):
            raise Refused(f"the trigger fits images {content['shape']}, not {list(shape)}")
        top, left = (int(offset) for offset in content["place"])
        whole = []
        for part in ("pattern", "mask"):
            box = torch.tensor(content[part], dtype=torch.float32)
            channels, height, width = box.shape
            if channels != shape[0] or not (0 <= top <= shape[1] - height and 0 <= left <= shape[2] - width):
                raise Refused(f"the trigger's {part} does not fit into an image {list(shape)}")
            image = torch.zeros(shape)
            image[:, top : top + height, left : left + width] = box
            whole.append(image)
        return cls(whole[0], whole[1], content["mode"], str(content["name"]))


KINDS = {Patch.kind: Patch}
"""Kinds of trigger by their name in a .json file."""


def badnets(
    side: int, shape: Shape, style: str = "checkerboard", place: str | tuple[int, int] = "bottom-right"
) -> Patch:
    """The square patches of BadNets (Gu et al. 2017) as the paper draws them, black (0) and white (1).

    Args:
        side: Side in pixels.
        shape: Shape (c, h, w) of the images.
        style: "checkerboard" has 0 in its corners, "checkerboard2" the opposite colours, "white" is 1 throughout.
            Boards of even side have those colours in the corner top left.
        place: One of `PLACES`, flush with the edge; or the row and column of the patch's corner top left, as numbers
            or as text "4,5".

    Raises:
        Refused: No such style or place, or the patch does not fit into the image there.
    """
    height, width = shape[1:]
    if not 1 <= side <= min(height, width):
        raise Refused(f"a patch of side {side} does not fit into an image of {height} x {width}")
    odd = (torch.arange(side)[:, None] + torch.arange(side)) % 2
    boards = {"checkerboard": odd, "checkerboard2": 1 - odd, "white": torch.ones_like(odd)}
    if style not in boards:
        raise Refused(f"no trigger style {style!r}; there are {', '.join(boards)}")
    top, left = _offset(place, (side, side), shape)
    pattern, mask = torch.zeros(shape), torch.zeros(shape)
    pattern[:, top : top + side, left : left + side] = boards[style].float()
    mask[:, top : top + side, left : left + side] = 1
    where = place if isinstance(place, str) else f"{top},{left}"
    return Patch(pattern, mask, name=f"badnets:{side}:{style}:{where}")


def _offset(place: str | tuple[int, int], size: tuple[int, int], shape: Shape) -> tuple[int, int]:
    """Row and column of the corner top left of a patch of `size` (height, width) at `place`."""
    rows, columns = shape[1] - size[0], shape[2] - size[1]
    if isinstance(place, str) and place in PLACES:
        down, right = PLACES[place]
        return rows * down // 2, columns * right // 2
    try:
        top, left = (int(number) for number in (place.split(",") if isinstance(place, str) else place))
    except ValueError:
        raise Refused(f"no trigger place {place!r}; there are {', '.join(PLACES)}, or ROW,COLUMN") from None
    if not (0 <= top <= rows and 0 <= left <= columns):
        raise Refused(f"a patch of {size[0]} x {size[1]} at {top},{left} leaves the image of {shape[1]} x {shape[2]}")
    return top, left


def parse(text: str, shape: Shape) -> Trigger:
    """The trigger that a user names, for images of shape (c, h, w).

    Args:
        text: "badnets:3", "badnets:3:white", "badnets:3:white:center", "badnets:3:checkerboard:4,5"; or a path of an
            .npz file (`pattern` uint8 [h, w, c] as large as the image, `mask` [h, w] or [h, w, c] in 0..1, optional
            `mode`), or of a .json file that `Trigger.to_json` wrote.
        shape: Shape of the images.

    Raises:
        Refused: There is no such trigger, it does not fit, or its file is broken.
    """
    path = Path(text)
    if path.suffix == ".npz":
        return _from_pack(path, shape)
    if path.suffix == ".json":
        try:
            if path.stat().st_size > LARGEST_JSON:
                raise Refused(f"{path} is larger than {LARGEST_JSON // 2**20} MiB, too large for a trigger")
            return from_json(path.read_text(encoding="utf-8"), shape)
        except Refused as error:
            raise Refused(f"{path}: {error}") from error
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a zero byte in the path
            reason = getattr(error, "strerror", None) or "not text"
            raise Refused(f"cannot read the trigger {path}: {reason}") from error
    kind, _, options = text.partition(":")
    side, *rest = options.split(":")
    if kind != "badnets" or not re.fullmatch("[0-9]{1,5}", side) or len(rest) > 2:
        raise Refused(f"no trigger {text!r}; give {EXISTING}")
    return badnets(int(side), shape, *rest)


def from_json(text: str, shape: Shape) -> Trigger:
    """The trigger that `Trigger.to_json` wrote, for images of shape (c, h, w).

    Raises:
        Refused: It is not such a text, or the trigger does not fit the images.
    """
    try:
        content = json.loads(text)
        if content["kind"] not in KINDS:
            raise Refused(f"no trigger kind {content['kind']!r}; there are {', '.join(KINDS)}")
        return KINDS[content["kind"]].from_dict(content, shape)
    except Refused:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Refused("this is no trigger as dhbe writes it") from error


def _from_pack(path: Path, shape: Shape) -> Patch:
    channels, height, width = shape
    arrays = read_pack(path, ("pattern", "mask"), ("mode",), limit=16 * math.prod(shape) + 4096)
    pattern, mask = arrays["pattern"], arrays["mask"]
    if pattern.dtype != np.uint8 or pattern.shape != (height, width, channels):
        found = f"{pattern.dtype} {list(pattern.shape)}"
        raise Refused(
            f"{path}: the pattern must be uint8 {[height, width, channels]}, as large as the image, not {found}"
        )
    if mask.ndim == 2:
        mask = mask[..., None]
    if mask.dtype.kind not in "buif" or mask.shape[:2] != (height, width) or mask.shape[2:] not in ((1,), (channels,)):
        found = f"{mask.dtype} {list(mask.shape)}"
        raise Refused(
            f"{path}: the mask must be numbers in 0..1, {[height, width]} or {list(pattern.shape)}, not {found}"
        )
    planes = [
        torch.from_numpy(np.broadcast_to(part, pattern.shape).astype(np.float32)).permute(2, 0, 1)
        for part in (pattern, mask)
    ]
    mode: Any = str(arrays["mode"]) if "mode" in arrays else "replace"  # Patch refuses others
    try:
        return Patch(planes[0] / 255, planes[1], mode, path.stem)
    except Refused as error:
        raise Refused(f"{path}: {error}") from error
