"""Hyperparameters, whose annotations contain their descriptions and bounds.

A method is a frozen dataclass with fields like ``Annotated[int, Setting("passes over the data", least=1)] = 20``. A field
may itself be such a dataclass, a group; groups are flattened on the command line and in records, so names are unique.
"""

import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from dhbe.errors import Refused

T = TypeVar("T")

RENAMED = {
    "album": "pool_size", "shown": "mask_area", "change": "epsilon", "suspicion": "anomaly_threshold",
    "calm": "stop_threshold", "triggered": "trigger_share", "light": "trigger_share_unsuspected",
}  # fmt: skip
"""New names of the settings of `fast` by those in records of format 1; for one version, both work as options."""


@dataclass(frozen=True)
class Setting:
    """Description and bounds in the annotation of a hyperparameter. NaN and infinities are never within bounds."""

    text: str
    """Description for `--help`."""
    least: float = 0.0
    """Inclusive lower bound."""
    most: float = math.inf
    """Inclusive upper bound."""
    above: float = -math.inf
    """Exclusive lower bound."""
    below: float = math.inf
    """Exclusive upper bound."""

    def allows(self, value: float) -> bool:
        """Whether a number is within bounds."""
        return self.least <= value <= self.most and self.above < value < self.below

    @property
    def bounds(self) -> str:
        """The bounds in words."""
        if self.above > -math.inf or self.below < math.inf:
            return f"above {max(self.above, self.least):g} and below {self.below:g}"
        return f"{self.least:g} to {self.most:g}" if self.most < math.inf else f"a number of at least {self.least:g}"


@dataclass(frozen=True)
class Field:
    """A hyperparameter of a dataclass or of one of its groups."""

    name: str
    kind: Any
    """Its type, without the annotation."""
    setting: Setting


def described(kind: type) -> Iterator[Field]:
    """All hyperparameters of a dataclass, with groups flattened."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for each in fields(kind):
        hint = hints[each.name]
        if is_dataclass(hint):
            yield from described(typing.cast(type, hint))
        else:
            (setting,) = [note for note in hint.__metadata__ if isinstance(note, Setting)]
            yield Field(each.name, hint.__origin__, setting)


def flat(settings: Any) -> dict[str, Any]:
    """The values of all hyperparameters by name, with groups flattened."""
    values: dict[str, Any] = {}
    for each in fields(settings):
        value = getattr(settings, each.name)
        values |= flat(value) if is_dataclass(value) else {each.name: value}
    return values


def changed(settings: T, values: Mapping[str, Any]) -> T:
    """A copy of the settings with some values replaced by name, also in groups; lists, as in records, become tuples."""
    new: dict[str, Any] = {}
    for each in fields(typing.cast(Any, settings)):
        value = getattr(settings, each.name)
        if is_dataclass(value):
            new[each.name] = changed(value, values)
        elif each.name in values:
            given = values[each.name]
            new[each.name] = tuple(given) if isinstance(given, list) else given
    return replace(typing.cast(Any, settings), **new)


def check(settings: Any) -> None:
    """Checks that all settings are within bounds.

    Raises:
        Refused: One is not; the message names the first such setting and its bounds.
    """
    values = flat(settings)
    for field in described(type(settings)):
        value = values[field.name]
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool) and not field.setting.allows(number):
                raise Refused(f"--{field.name.replace('_', '-')} {number}: it must be {field.setting.bounds}")
