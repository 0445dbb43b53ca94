"""Parsers of option values: numbers, shapes and classes."""

import argparse
from collections.abc import Callable
from typing import Any

from dhbe.attacks import Target
from dhbe.data import Shape


def between(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], Any]:
    """A parser of numbers within bounds, both inclusive."""

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number") from None
        if not least <= value <= most:  # NaN too
            raise argparse.ArgumentTypeError(f"{text} is not between {least:,} and {most:,}")
        return value

    return read


whole = between(int, 2, 100_000)
seed = between(int, 0, 2**63 - 1)
fraction = between(float, 0, 1)
seconds = between(float, 0, 10**9)
count = between(int, -(2**40), 2**40)
number = between(float, -1e38, 1e38)
unit = between(float, -1e6, 1e6)


def numbers(text: str) -> list[float]:
    """Numbers separated by spaces or commas."""
    return [unit(part) for part in text.replace(",", " ").split()]


def constants(text: str) -> list[float] | str:
    """Numbers, or a name, which is checked when the model is loaded."""
    return text if text[:1].isalpha() else numbers(text)


def target(text: str) -> Target:
    """A class, or `next`."""
    return "next" if text == "next" else int(text)


def shape(text: str) -> Shape:
    """Channels, height and width, as 3x32x32."""
    sides = text.lower().split("x")
    if len(sides) != 3 or not all(side.isdecimal() and 1 <= int(side) <= 1024 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape CHANNELSxHEIGHTxWIDTH up to 1024, such as 3x32x32")
    channels, height, width = map(int, sides)
    return channels, height, width
