"""Triggers: objects that turn clean images into triggered ones; `parse` makes one from its command-line notation."""

from dhbe.attacks.triggers.base import Trigger
from dhbe.attacks.triggers.low_bits import LowBits
from dhbe.attacks.triggers.makers import badnets
from dhbe.attacks.triggers.patch import PLACES, Patch
from dhbe.attacks.triggers.reflection import Reflection
from dhbe.attacks.triggers.text import KINDS, MAKERS, from_json, parse, summary, usage
from dhbe.attacks.triggers.warp import Warp

__all__ = [
    "KINDS", "MAKERS", "PLACES", "LowBits", "Patch", "Reflection", "Trigger", "Warp", "badnets", "from_json", "parse",
    "summary", "usage",
]  # fmt: skip
