"""Command-line options for the hyperparameters of a method."""

import argparse
import sys
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from dhbe import settings
from dhbe.cli import values
from dhbe.cli.parser import Parser

T = TypeVar("T")


def add(
    parser: Parser, kind: type, title: str, default: Any = None, renamed: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Adds an option for each hyperparameter of a method.

    Args:
        parser: The parser that gets the options.
        kind: The frozen dataclass of the method.
        title: Title of the option group.
        default: An instance of `kind`, whose values `--help` shows as defaults.
        renamed: New names by deprecated ones, which are still accepted.
    """
    group = parser.add_argument_group(title)
    usual = settings.flat(default) if default is not None else {}
    names = set()
    for field in settings.described(kind):
        shown = field.setting.text
        if field.name in usual:
            shown += f" (default: {_shown(usual[field.name])})"
        group.add_argument(_option(field.name), default=None, help=shown.replace("%", "%%"), **_reading(field.kind))
        names.add(field.name)
    for old, new in renamed.items():
        if new in names and old not in names:
            (field,) = [field for field in settings.described(kind) if field.name == new]
            group.add_argument(
                _option(old), dest=new, action=_Renamed, default=None, help=argparse.SUPPRESS, **_reading(field.kind)
            )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_shown(each) for each in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _reading(kind: Any) -> dict[str, Any]:
    """The argparse keywords that parse a value of a type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is typing.Literal:
        return {"type": str, "choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        of, *rest = typing.get_args(kind)
        return {**_reading(of), "nargs": "+" if Ellipsis in rest else 1 + len(rest)}
    numbers = {int: (values.count, "N"), float: (values.number, "X")}
    read, metavar = numbers.get(kind, (kind, None))
    return {"type": read, "metavar": metavar}


class _Renamed(argparse.Action):
    """Accepts an option by its old name, with a note."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(f"note: {option_string} is now called {_option(self.dest)}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def changed(method: T, args: argparse.Namespace) -> T:
    """The method with the settings given on the command line."""
    given = {field.name: getattr(args, field.name, None) for field in settings.described(type(method))}
    return settings.changed(method, {name: value for name, value in given.items() if value is not None})
