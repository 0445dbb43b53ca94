"""Erase backdoors from image classifiers without data.

erasure = dhbe.erase(network, input_shape=(3, 32, 32), mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
erasure.model, erasure.record
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dhbe.api import Erasure, Evidence, Outcome, attack, defend, erase, scan, score, verify
    from dhbe.attacks import BadNets
    from dhbe.defenses import DHBE, PEERS, PRESETS, FastDHBE
    from dhbe.errors import Failed, Interrupted, Refused
    from dhbe.search.survey import Survey
    from dhbe.suspects import load as load_suspect

_PLACES = {
    "BadNets": "dhbe.attacks", "DHBE": "dhbe.defenses", "FastDHBE": "dhbe.defenses", "PEERS": "dhbe.defenses", "PRESETS": "dhbe.defenses", "Erasure": "dhbe.api",
    "Evidence": "dhbe.api", "attack": "dhbe.api", "defend": "dhbe.api", "erase": "dhbe.api", "scan": "dhbe.api", "score": "dhbe.api", "verify": "dhbe.api", "Outcome": "dhbe.api", "Survey": "dhbe.search.survey", "Failed": "dhbe.errors",
    "Interrupted": "dhbe.errors", "Refused": "dhbe.errors", "load_suspect": "dhbe.suspects:load",
}  # fmt: skip

__all__ = [
    "DHBE", "PEERS", "PRESETS", "BadNets", "Erasure", "Evidence", "Failed", "FastDHBE", "Interrupted", "Outcome", "Refused", "Survey",
    "attack", "defend", "erase", "load_suspect", "scan", "score", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Loads public names on first use, so that `import dhbe` does not import torch."""
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("dhbe")
        except PackageNotFoundError:  # run from a source tree that is not installed
            return "unknown"
    if name not in _PLACES:
        raise AttributeError(f"module 'dhbe' has no attribute {name!r}")
    module, _, other = _PLACES[name].partition(":")
    return getattr(import_module(module), other or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
