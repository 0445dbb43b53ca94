"""The command-line notation of triggers: a name with parameters, or a file, optionally with transformations."""

import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dhbe import files, foreign
from dhbe.attacks.triggers import makers
from dhbe.attacks.triggers.base import HEADER, Trigger
from dhbe.attacks.triggers.low_bits import LowBits
from dhbe.attacks.triggers.patch import Patch
from dhbe.attacks.triggers.reflection import Reflection
from dhbe.attacks.triggers.warp import Warp
from dhbe.data import Shape, read_pack
from dhbe.errors import Refused, said

KINDS: dict[str, type[Trigger]] = {kind.kind: kind for kind in (Patch, LowBits, Reflection, Warp)}
"""Kinds of trigger by their name in a file."""

MAKERS: dict[str, Callable[..., Trigger]] = {
    made.__name__: made
    for made in (
        makers.badnets, makers.pixel, makers.scattered, makers.faint, makers.blend,
        makers.sig, makers.lsb, makers.refool, makers.warp,
    )
}  # fmt: skip
"""Functions (shape, **parameters) that make a trigger, by command-line name."""

EXISTING = (
    f"badnets:SIDE[:STYLE[:PLACE]], {', '.join(name for name in MAKERS if name != 'badnets')} (with settings as "
    "sig:30 or sig:delta=30), an .npz file with pattern and mask, or a .json or .npz file written by dhbe"
)
"""What `parse` accepts, for messages."""

LARGEST_JSON = 32 * 2**20
"""Maximum size of a .json file in bytes, enough for a trigger over 512 x 512 pixels; larger ones fit into an .npz."""


def parse(text: str, shape: Shape) -> Trigger:
    """Makes a trigger from its notation.

    Args:
        text: A name in `MAKERS` with its parameters, such as `badnets:3:white` or `sig:delta=30`; an .npz file with
            `pattern` (uint8 [h, w, c], as large as the image), `mask` ([h, w] or [h, w, c] in 0..1) and optionally
            `mode` (replace or add); or a .json or .npz trigger file written by dhbe. Any of them may be followed by
            `:opacity=SHARE`, `:scale=FACTOR`, `:at=PLACE` and `:copies=4` or 9.
        shape: Shape (c, h, w) of the images.

    Raises:
        Refused: There is no such trigger, its file is broken, or it does not fit the images.
    """
    text, *changes = re.split(r":(?=(?:opacity|scale|at|copies)=)", text)
    trigger = _named(text, shape)
    for change in changes:
        trigger = _transformed(trigger, *change.split("=", 1))
    return trigger


def usage(name: str) -> str:
    """The command-line syntax of a maker.

    >>> usage("sig"), usage("badnets")
    ('sig[:DELTA[:CYCLES]]', 'badnets:SIDE[:STYLE[:PLACE[:SEED]]]')
    """
    parameters = _parameters(MAKERS[name])
    text = name
    for parameter in parameters:
        required = parameter.default is parameter.empty
        text += f"{'' if required else '['}:{parameter.name.upper()}"
    return text + "]" * sum(parameter.default is not parameter.empty for parameter in parameters)


def summary(name: str) -> str:
    """The first line of a maker's docstring."""
    return (inspect.getdoc(MAKERS[name]) or "").splitlines()[0]


def from_json(text: str, shape: Shape) -> Trigger:
    """Restores a trigger written by `Trigger.to_json`, for images of shape (c, h, w).

    Raises:
        Refused: It is not such a text, or the trigger does not fit the images.
    """
    return _restored(text, {}, shape)


def _named(text: str, shape: Shape) -> Trigger:
    path = Path(text)
    if path.suffix.lower() == ".npz":
        return _from_pack(path, shape)
    if path.suffix.lower() == ".json":
        return _from_json_file(path, shape)
    name, *options = text.split(":")
    if name not in MAKERS:
        raise Refused(f"no trigger {foreign.name(text)!r}; give {EXISTING}")
    try:
        given = _bound(MAKERS[name], options)
    except (TypeError, ValueError):
        raise Refused(f"no trigger {foreign.name(text)!r}; give {usage(name)}") from None
    return MAKERS[name](shape=shape, **given)


def _bound(maker: Callable[..., Trigger], options: list[str]) -> dict[str, Any]:
    """Parameters of a maker from VALUE (by position) and KEY=VALUE."""
    parameters = {parameter.name: parameter for parameter in _parameters(maker)}
    given: dict[str, str] = {}
    for place, option in enumerate(options):
        key, equals, value = option.partition("=")
        if not (equals and key in parameters):
            key, value = list(parameters)[place] if place < len(parameters) else "", option
        if key not in parameters or key in given:
            raise ValueError
        given[key] = value
    if any(parameter.default is parameter.empty for name, parameter in parameters.items() if name not in given):
        raise ValueError
    return {key: _value(parameters[key].annotation, value) for key, value in given.items()}


def _parameters(maker: Callable[..., Trigger]) -> list[inspect.Parameter]:
    return [each for each in inspect.signature(maker).parameters.values() if each.name != "shape"]


def _value(kind: Any, text: str) -> Any:
    if kind is int:
        if not re.fullmatch("[0-9]{1,9}", text):
            raise ValueError
        return int(text)
    if kind is float:
        return float(text)  # makers refuse what is not finite
    return text


def _transformed(trigger: Trigger, key: str, value: str) -> Trigger:
    try:
        if key == "copies" and value not in ("1", "4", "9"):
            raise ValueError
        changed = {
            "opacity": lambda: trigger.faded(float(value)),
            "scale": lambda: trigger.resized(float(value)),
            "at": lambda: trigger.moved(value),
            "copies": lambda: trigger.amplified(int(value)),  # pyright: ignore[reportArgumentType] (checked above)
        }[key]()
    except Refused:
        raise
    except ValueError:
        raise Refused(
            f"trigger {trigger.name}: {key}={value[:50]} is not one of opacity=SHARE, scale=FACTOR, at=PLACE, copies=4 or 9"
        ) from None
    if changed is None:
        raise Refused(f"trigger {trigger.name} does not support {key}={value[:50]}: leave it out")
    return changed


def _from_json_file(path: Path, shape: Shape) -> Trigger:
    with files.opened(path, LARGEST_JSON) as file:
        try:
            return _restored(file.read().decode(), {}, shape)
        except (Refused, UnicodeDecodeError) as error:
            raise Refused(f"{foreign.name(path)}: {said(error)}") from error
        except OSError as error:
            raise Refused(f"cannot read the trigger {foreign.name(path)}: {error.strerror}") from error


def _restored(text: str, arrays: dict[str, np.ndarray], shape: Shape) -> Trigger:
    try:
        content = json.loads(text)
        if content["kind"] not in KINDS:
            raise Refused(f"no trigger kind {content['kind']!r}; available: {', '.join(KINDS)}")
        if content["shape"] != list(shape):
            raise Refused(f"the trigger fits images {content['shape']}, not {list(shape)}")
        return KINDS[content["kind"]].from_content({**content, **arrays}, shape)
    except Refused as refusal:
        raise Refused(" ".join(str(refusal).split())[:300]) from refusal  # it may quote what the file says
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Refused("this is not a trigger written by dhbe") from error


def _from_pack(path: Path, shape: Shape) -> Trigger:
    ours = {name for kind in KINDS.values() for name in kind.arrays}
    limit = 16 * math.prod(shape) + 2**16
    arrays = read_pack(path, (), (HEADER, "mode", *sorted(ours)), limit=limit)
    if HEADER not in arrays:
        read_pack(path, ("pattern", "mask"), limit=limit)  # says what is missing
        return _from_user(path, arrays, shape)
    try:
        return _restored(str(arrays[HEADER]), {key: arrays[key] for key in ours if key in arrays}, shape)
    except Refused as error:
        raise Refused(f"{foreign.name(path)}: {said(error)}") from error


def _from_user(path: Path, arrays: dict[str, np.ndarray], shape: Shape) -> Patch:
    channels, height, width = shape
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
        raise Refused(f"{foreign.name(path)}: {said(error)}") from error
