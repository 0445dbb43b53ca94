"""Cases: single runs, told whole by plain values, so that equal content is one case wherever it is asked for."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

Labels = Mapping[str, Any]
"""Where a case stands in a table or figure, by the names of its rows and columns."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run. What its result depends on is in `work`, `settings` and `needs`; the rest is for people."""

    work: str
    """What is done, a name of `working.WORKS`."""
    settings: Mapping[str, Any]
    """With what, in values that JSON has."""
    needs: "tuple[Case, ...]" = ()
    """Cases whose results it works on, as a victim."""
    name: str
    """In a few words of letters, digits and hyphens; the record's file begins with it."""
    labels: Labels = field(default_factory=dict)
    minutes: float = 1.0
    """That it takes, about."""

    @cached_property
    def id(self) -> str:
        """Of its content, 12 hexadecimal digits; a file of the user's counts by its name, and by its code's version."""
        told = {**self.settings, **({"file": Path(self.settings["file"]).name} if "file" in self.settings else {})}
        content = [self.work, told, [case.id for case in self.needs]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def stem(self) -> str:
        """Of its record's file."""
        return f"{self.name}_{self.id}"

    def labelled(self, **labels: Any) -> "Case":
        """The same case at another place of a table."""
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
        settings: Of the attack, where they differ from its defaults.
        data: A name of data, as on the command line.
        arch: An architecture, likewise.
        fit: Settings of the training.
        images: How many training images; None takes all.
        tested: The first so many test images measure; None takes all.
        start: A clean victim whose weights the training starts from.
        seed: Of everything random.
        file: Python code of the user's that defines the attack.
        minutes: That it takes, about.
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
        victim: What it works on.
        defense: A preset of `dhbe erase`, a name of `dhbe defend`, or a class in `file`.
        settings: Of the defence, where they differ from its defaults.
        lent: Clean training images for a defence that needs some; None lends none.
        subset: Which of the random subsets of so many images.
        seed: Of everything random.
        without: A part that is taken out, by its name in `parts.PARTS`.
        precision: `auto`, `fp32` or `bf16`.
        file: Python code of the user's that defines the defence.
        minutes: That it takes, about.
        **labels: Where the case stands in its table.
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
    """A search for a backdoor in a victim, with the survey's settings where they differ from its defaults."""
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
    """Whatever a function of the user's does: it returns a `Record`, or figures by name.

    Args:
        function: Its name.
        file: Python code of the user's that defines it.
        name: Of the case, for people.
        minutes: That it takes, about.
        labels: Where the case stands in its table.
        **settings: What it is called with, in values that JSON has.
    """
    told = {"file": file, "function": function, "settings": settings}
    return Case(work="call", settings=told, name=plain(name), labels=labels or {}, minutes=minutes)


def with_needs(cases: Iterable[Case]) -> dict[str, Case]:
    """Cases and all that they need by id, each behind what it needs."""
    found: dict[str, Case] = {}
    for case in cases:
        found |= {known: need for known, need in with_needs(case.needs).items() if known not in found}
        found.setdefault(case.id, case)
    return found


def plain(name: str) -> str:
    """A name as a file may have it.

    >>> plain("fast-on-file.py:net")
    'fast-on-file-py-net'
    """
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in name)
