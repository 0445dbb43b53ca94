"""The names of options in messages, for the command line and for Python.

Messages name an option by its flag, and join a value to it: `--pool-size`, `--mean=auto`. The command line shows them as they
are, since both can be typed; `in_python` turns them into parameters.
"""

import re

NAMED = re.compile(r"(?<![\w./-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?:=([^\s,;()]*[^\s,;:.()]))?(?![\w/-]|\.\w)")
"""A flag, with its value if there is one."""

NAMES = {"input": "input_shape", "class_names": "order"}
"""Parameters whose names differ from those of their flags by more than hyphens."""

NUMBER = re.compile(r"-?\d*\.?\d+(?:e-?\d+)?")
SHAPE = re.compile(r"(?:\d+|[A-Z])(?:x(?:\d+|[A-Z])){2}")


def in_python(text: str) -> str:
    """A message with parameters instead of flags.

    >>> in_python("give --mean=cifar10, or --mean=auto: wrong ones mislead, as does --input=3x32x32; lower --pool-size")
    "give `mean='cifar10'`, or `mean='auto'`: wrong ones mislead, as does `input_shape=(3, 32, 32)`; lower `pool_size`"
    """
    return NAMED.sub(_parameter, text)


def told(text: str, command: str | None) -> str:
    """A message as it is for a run of the command line, or `in_python` for one without a command."""
    return text if command else in_python(text)


def _parameter(found: re.Match[str]) -> str:
    name, value = found[1].replace("-", "_"), found[2]
    name = NAMES.get(name, name)
    return f"`{name}`" if value is None else f"`{name}={_literal(value)}`"


def _literal(value: str) -> str:
    if SHAPE.fullmatch(value):
        return f"({value.replace('x', ', ')})"
    return value if NUMBER.fullmatch(value) else repr(value)
