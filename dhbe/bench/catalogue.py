"""The available experiments: those in `experiments/`, and the user's files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from dhbe.bench.cases import Case
from dhbe.bench.experiment import Experiment
from dhbe.bench.scales import Scale
from dhbe.errors import Refused

NAMES = (
    *(f"table-{number}" for number in range(1, 9)), *(f"figure-{number}" for number in range(3, 13)),
    "erasures", "calibration", "ablation", "peers", "pareto", "precision",
)  # fmt: skip
"""Names in the order of the paper, followed by ours. Figures 1 and 2 are illustrations."""


def find(names: Sequence[str]) -> list[Experiment]:
    """Experiments by name; `all` means those of the package, and a name ending in `.py` is a file, which is executed.

    Raises:
        Refused: There is no such experiment, or the file defines none.
    """
    found: dict[str, Experiment] = {}
    for name in names:
        for each in NAMES if name == "all" else (name,):
            found.setdefault(each, _one(each))
    return list(found.values())


def _one(name: str) -> Experiment:
    if name.endswith(".py"):
        return _of_file(Path(name))
    if name not in NAMES:
        raise Refused(
            f"no experiment {name!r}; available: all, {', '.join(NAMES)}, or your own FILE.py (docs/bench.md)"
        )
    module = import_module(f"dhbe.bench.experiments.{name.replace('-', '_')}")
    return replace(module.EXPERIMENT, name=name)


def _of_file(path: Path) -> Experiment:
    if not path.is_file():
        raise Refused(f"{path} is not a file: give Python code that defines EXPERIMENT (docs/bench.md)")
    from dhbe.bench.working import user_code  # imports torch

    made: Any = getattr(user_code(str(path)), "EXPERIMENT", None)
    if not isinstance(made, Experiment):
        raise Refused(f"{path} defines no EXPERIMENT: see docs/bench.md for one")
    return replace(made, name=path.stem, file=path)


def cases(experiment: Experiment, scale: Scale, only: Mapping[str, Sequence[str]]) -> list[Case]:
    """The cases of an experiment with the wanted labels; a label that a case lacks is ignored.

    Raises:
        Refused: The scale does not support the experiment.
    """
    return [
        case
        for case in experiment.cases(scale)
        if all(str(case.labels.get(label, wanted[0])) in wanted for label, wanted in only.items())
    ]
