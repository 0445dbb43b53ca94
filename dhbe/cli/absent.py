"""Help without torch: other packages are not loaded while a verb says which options it has.

A hyperparameter stands beside the code that uses it, and that code begins with `import torch`, which takes seconds. A list
of options computes nothing, so for its time every package of others has a stand-in whose names mean nothing at all, as in
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
"""What stays itself: this package, what prints completions, and Python."""


def wanted(verb: str, words: Sequence[str]) -> bool:
    """Whether a verb with these words only tells of options.

    >>> wanted("erase", ["vendor.pt", "-h"]), wanted("erase", ["--", "-h"])
    (True, False)
    """
    options = words[: words.index("--")] if "--" in words else words
    return verb == "completion" or not {"-h", "--help"}.isdisjoint(options)


@contextmanager
def others() -> Iterator[None]:
    """Inside, packages of others that were not loaded yet are stand-ins; what was loaded over them is forgotten again."""
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
    """The type of a name that may be called, subclassed, indexed and used as a decorator or a type, to no effect."""

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
    """Any class, function or value of a package that is not loaded."""

    def __init_subclass__(cls, **more: Any) -> None:
        """Takes whatever the real class would."""


def _known(name: str) -> Any:
    if name.startswith("__"):  # what Python asks of every object
        raise AttributeError(name)
    return Nothing


def _root(name: str) -> str:
    return name.partition(".")[0]


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _known(name)


class _Finder:
    """Finds and loads a stand-in for every module that does not stay itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if _root(name) in REAL:
            return None
        return ModuleSpec(name, self, is_package=True)  # pyright: ignore[reportArgumentType]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""
