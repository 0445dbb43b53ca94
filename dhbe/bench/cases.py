"""Cases: single runs, fully described by plain values, so that equal descriptions are the same case everywhere."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

Labels = Mapping[str, Any]
"""The position of a case in a table or figure, by names of rows and columns."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run. Its result depends on `work`, `settings` and `needs` only; the rest is for display."""

    work: str
    """The kind of work, a name in `working.WORKS`."""
    settings: Mapping[str, Any]
    """The settings of the work, as JSON values."""
    needs: "tuple[Case, ...]" = ()
    """Cases whose results it needs, such as a victim."""
    name: str
    """A short name of letters, digits and hyphens, with which the record's file name begins."""
    labels: Labels = field(default_factory=dict)
    minutes: float = 1.0
    """Estimated duration."""

    @cached_property
    def id(self) -> str:
        """A hash of the description, 12 hexadecimal digits; a user's file counts by name (its code by its version)."""
        told = {**self.settings, **({"file": Path(self.settings["file"]).name} if "file" in self.settings else {})}
        content = [self.work, told, [case.id for case in self.needs]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def stem(self) -> str:
        """The stem of its record's file name."""
        return f"{self.name}_{self.id}"

    def labelled(self, **labels: Any) -> "Case":
        """The same case with further labels."""
        return replace(self, labels={**self.labels, **labels})


def planted(
    attack: str,
    settings: Mapping[str, Any],
    *,
    data: str,
    arch: str,
    fit: Mapping[str, Any],
    images: int | None = None,
    tested: int | None = None,
    start: Case | None = None,
    seed: int = 0,
    file: str | None = None,
    minutes: float = 1.0,
) -> Case:
    """A victim: a classifier with a backdoor, or a clean one.

    Args:
        attack: A name of `dhbe attack`, or a class in `file`.
        settings: Settings of the attack that differ from its defaults.
        data: Name of the data, as on the command line.
        arch: Architecture, as on the command line.
        fit: Settings of the training.
        images: Number of training images; None means all.
        tested: Number of test images to measure on, the first ones; None means all.
        start: A clean victim from whose weights the training starts.
        seed: Seed of everything random.
        file: Python file of the user that defines the attack.
        minutes: Estimated duration.
    """
    told = {
        "attack": attack, "settings": dict(settings), "data": data, "arch": arch, "fit": dict(fit), "images": images,
        "tested": tested, "seed": seed,
    }  # fmt: skip
    name = "-".join([attack.lower(), *(str(settings[key]) for key in ("side",) if key in settings), arch, data])
    return Case(
        work="plant", settings=told | ({"file": file} if file else {}), needs=(start,) if start else (),
        name=plain(name), minutes=minutes,
    )  # fmt: skip


def erased(
    victim: Case,
    defense: str,
    settings: Mapping[str, Any] | None = None,
    /,
    *,
    lent: int | None = None,
    subset: int = 0,
    seed: int = 0,
    without: str | None = None,
    precision: str = "auto",
    file: str | None = None,
    minutes: float = 1.0,
    **labels: Any,
) -> Case:
    """A defence on a victim.

    Args:
        victim: The victim.
        defense: A preset of `dhbe erase`, a name of `dhbe defend`, or a class in `file`.
        settings: Settings of the defence that differ from its defaults.
        lent: Number of clean training images for a defence that needs some; None for none.
        subset: Which of the random subsets of that many images.
        seed: Seed of everything random.
        without: A component to ablate, by its name in `parts.PARTS`.
        precision: `auto`, `fp32` or `bf16`.
        file: Python file of the user that defines the defence.
        minutes: Estimated duration.
        **labels: Position of the case in its table.
    """
    told: dict[str, Any] = {"defense": defense, "settings": dict(settings or {}), "seed": seed}
    told |= {"lent": lent, "subset": subset} if lent else {}
    told |= {"without": without} if without else {}
    told |= {"precision": precision} if precision != "auto" else {}
    told |= {"file": file} if file else {}
    name = plain(f"{defense.lower()}-on-{victim.name}-seed-{seed}")
    return Case(work="erase", settings=told, needs=(victim,), name=name, labels=labels, minutes=minutes)


def scanned(
    victim: Case, settings: Mapping[str, Any] | None = None, /, *, seed: int = 0, minutes: float = 1.0, **labels: Any
) -> Case:
    """A scan of a victim; `settings` are those of the survey that differ from its defaults."""
    told = {"settings": dict(settings or {}), "seed": seed}
    return Case(
        work="scan",
        settings=told,
        needs=(victim,),
        name=plain(f"scan-of-{victim.name}"),
        labels=labels,
        minutes=minutes,
    )


def called(
    function: str, file: str, *, name: str, minutes: float = 1.0, labels: Labels | None = None, **settings: Any
) -> Case:
    """A call of a user's function, which returns a `Record`, or numbers by name.

    Args:
        function: Name of the function.
        file: Python file of the user that defines it.
        name: Name of the case, for display.
        minutes: Estimated duration.
        labels: Position of the case in its table.
        **settings: Arguments of the call, as JSON values.
    """
    told = {"file": file, "function": function, "settings": settings}
    return Case(work="call", settings=told, name=plain(name), labels=labels or {}, minutes=minutes)


def with_needs(cases: Iterable[Case]) -> dict[str, Case]:
    """Cases and everything that they need by id, each after its needs."""
    found: dict[str, Case] = {}
    for case in cases:
        found |= {known: need for known, need in with_needs(case.needs).items() if known not in found}
        found.setdefault(case.id, case)
    return found


def plain(name: str) -> str:
    """A name made safe for files.

    >>> plain("fast-on-file.py:net")
    'fast-on-file-py-net'
    """
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in name)
