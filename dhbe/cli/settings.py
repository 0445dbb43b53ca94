"""An option for each hyperparameter of a method."""

import argparse
import ast
import inspect
import typing
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

from dhbe.cli import values
from dhbe.cli.parser import Parser


def add(parser: Parser, kind: type, title: str, default: Any = None) -> None:
    """An option for each hyperparameter of a frozen dataclass; its help is the field's annotation or docstring."""
    group = parser.add_argument_group(title)
    hints, docs = typing.get_type_hints(kind, include_extras=True), _docs(kind)
    for field in fields(kind):
        hint = hints[field.name]
        kind_of, note = (hint.__origin__, hint.__metadata__[0]) if hasattr(hint, "__metadata__") else (hint, "")
        note = note or docs.get(field.name, "")
        more: dict[str, Any] = {"type": {int: values.count, float: values.number}.get(kind_of, kind_of)}
        if kind_of is bool:
            more = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind_of) is typing.Literal:
            more = {"choices": typing.get_args(kind_of)}
        value = getattr(default, field.name, None)
        usual = f"{value:.3g}" if isinstance(value, float) else value
        shown = f"{note} (default: {usual})" if default is not None else note
        group.add_argument(
            f"--{field.name.replace('_', '-')}", default=None, help=shown.strip().replace("%", "%%"), **more
        )


def _docs(kind: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    for each in kind.__mro__:
        if not is_dataclass(each):
            continue
        (tree,) = ast.parse(inspect.getsource(each)).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in pairwise(tree.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found.setdefault(ast.unparse(field.target), " ".join(str(below.value.value).split()))
    return found


def changed(settings: Any, args: argparse.Namespace) -> Any:
    """The settings, with those replaced that were given."""
    given = {field.name: getattr(args, field.name, None) for field in fields(settings)}
    return replace(settings, **{name: value for name, value in given.items() if value is not None})
