"""Help without torch: third-party packages are mocked while a verb lists its options.

Hyperparameters are defined beside the code that uses them, and importing that code imports torch, which takes seconds.
Listing options computes nothing, so meanwhile every third-party package is replaced by a stand-in without behaviour, as with
Sphinx's `autodoc_mock_imports`; the settings themselves are the real ones.
"""

import sys
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REAL = {"dhbe", "shtab", *sys.stdlib_module_names}
"""Packages that are not mocked, besides the standard library: this one, and the one that prints completions."""


def wanted(verb: str, words: Sequence[str]) -> bool:
    """Whether a verb with these arguments only lists options.

    >>> wanted("erase", ["vendor.pt", "-h"]), wanted("erase", ["--", "-h"])
    (True, False)
    """
    options = words[: words.index("--")] if "--" in words else words
    return verb == "completion" or not {"-h", "--help"}.isdisjoint(options)


@contextmanager
def others() -> Iterator[None]:
    """Mocks third-party packages that are not imported yet; on exit, forgets them and the modules that imported them."""
    before, finder = set(sys.modules), _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules.keys() - before if _root(name) not in sys.stdlib_module_names]:
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent in before:
                vars(sys.modules[parent]).pop(child, None)


class _Anything(ABCMeta):
    """Metaclass of a stand-in that can be called, subclassed, indexed and used as a decorator or a type, to no effect."""

    def __getattr__(cls, name: str) -> Any:
        return _known(name)

    def __call__(cls, *args: Any, **more: Any) -> Any:
        return Nothing

    def __getitem__(cls, key: Any) -> Any:
        return Nothing

    def __or__(cls, other: Any) -> Any:
        return Nothing

    __ror__ = __or__


class Nothing(metaclass=_Anything):
    """Stand-in for any class, function or value of a mocked package."""

    def __init_subclass__(cls, **more: Any) -> None:
        """Accepts whatever the real class would."""


def _known(name: str) -> Any:
    if name.startswith("__"):  # Python's own protocols
        raise AttributeError(name)
    return Nothing


def _root(name: str) -> str:
    return name.partition(".")[0]


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _known(name)


class _Finder:
    """Finds and loads a stand-in for every module outside `REAL`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if _root(name) in REAL:
            return None
        return ModuleSpec(name, self, is_package=True)  # pyright: ignore[reportArgumentType]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: a stand-in has no code."""
