"""What can be said of a classifier without data: is it backdoored, and is a backdoor gone?"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, TypeVar, Unpack

import torch

from dhbe import claims, files, records, report, runs
from dhbe.api import halving, machine
from dhbe.classifier import Classifier
from dhbe.defenses import PRESETS
from dhbe.errors import Refused
from dhbe.evaluation import battery, measuring
from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.measuring import measured
from dhbe.records import ClassFound, Measures, Record
from dhbe.search import scan as search
from dhbe.search import verify as both
from dhbe.search.search import FEW
from dhbe.search.survey import Survey
from dhbe.steps import Precision, Round
from dhbe.suspects import Suspect

Found = TypeVar("Found")

Watch = Callable[[int, Round], None]

UNLIKELY = 0.35
"""Probability of a backdoor up to which the verdict is that nothing was found."""


class Searching(TypedDict):
    """What a search may be told; each may be left out."""

    survey: NotRequired[Survey]
    """Its hyperparameters; the default preset's where they are left out."""
    seed: NotRequired[int]
    """Of everything random (default: 0)."""
    device: NotRequired[str]
    """`auto` (default), `cpu`, `cuda`, `cuda:1`, ..."""
    precision: NotRequired[machine.Precision]
    """`fp32`, `bf16`, or `auto` (default): bf16 where the device is made for it."""
    out: NotRequired[Path | None]
    """Folder for record and report; None (default) keeps all in memory."""
    overwrite: NotRequired[bool]
    """Begin anew over what `out` holds, which stays until the new results are complete."""
    inputs: NotRequired[Sequence[Path]]
    """Files beside the models' own that the search was made from; none is ever replaced."""
    watch: NotRequired[Watch]
    """Called after every round with its number and losses."""
    parts: NotRequired[Callable[[int, int], None]]
    """Called in the battery with how many parts are done, and of how many."""


@dataclass(frozen=True)
class Outcome:
    """What a search gives back."""

    record: Record
    pictures: dict[str, bytes]
    """PNG files for the report."""


def scan(suspect: Suspect, **options: Unpack[Searching]) -> Outcome:
    """Searches a classifier for a backdoor; it needs no data.

    Args:
        suspect: What `suspects.load` returned.
        **options: See `Searching`.

    Raises:
        Refused: The model or the settings cannot be used, or the folder holds another run.
    """
    with _Search(suspect, "scan", options) as run:
        found = run.fitting(
            lambda survey: search.scan(run.model, survey, seed=run.seed, precision=run.precision, watch=run.watch)
        )
        label, index = found.suspect, float(found.indices.max())
        chance = search.probability(index)
        backdoored = index > run.survey.anomaly_threshold
        doubted = chance > UNLIKELY or run.few or run.contradicted
        classes = [
            ClassFound(index=i, family=family, lead=lead, success=share)
            for i, family, lead, share in zip(
                found.indices.tolist(), found.families, found.leads.tolist(), found.success.tolist(), strict=True
            )
        ]
        grey = torch.full_like(found.pixels[:1], 0.5).expand(len(classes), -1, -1, -1)
        pictures = {
            "found": report.grid(found.forms[[label]](grey[:1]).cpu(), scale=6),
            "found_each": report.grid(found.forms(grey).cpu(), scale=4),
            "stamped": report.grid(found.forms[[label]](found.pixels[:16]).cpu()),
        }
        signs = {"anomaly_index": index, "suspected_class": label, "probability": chance}
        return run.end(
            pictures, before=Measures(signs=signs), classes=classes,
            verdict="backdoored" if backdoored else "unclear" if doubted else "nothing found",
            backdoored=backdoored,
        )  # fmt: skip


def verify(
    suspect: Suspect, cleaned: Suspect, *, evidence: Evidence | None = None, **options: Unpack[Searching]
) -> Outcome:
    """Searches a suspect classifier and what a defence made of it, and says what is left; it needs no data.

    Args:
        suspect: The model before.
        cleaned: The model after, of the same classes and shape of images.
        evidence: Data, and with a trigger the battery of residual risks is measured too.
        **options: See `Searching`.

    Raises:
        Refused: The models do not fit together or to the data, or the settings cannot be used.
    """
    if (suspect.info.classes, suspect.info.input) != (cleaned.info.classes, cleaned.info.input):
        raise Refused(
            f"the models are of {suspect.info.classes} classes and {suspect.info.input}, and of {cleaned.info.classes} and "
            f"{cleaned.info.input}: give two states of one model"
        )
    if evidence:
        measuring.check(evidence, suspect.info)
    options["inputs"] = [*cleaned.files, *options.get("inputs", ())]
    with _Search(suspect, "verify", options) as run:
        after = _ready(cleaned, run.where)
        found = run.fitting(
            lambda survey: both.compare(
                run.model, after, survey, seed=run.seed, precision=run.precision, watch=run.watch
            )
        )
        shown = [{"anomaly_index": found.index, "suspected_class": found.suspect}, {"agreement": found.agreement}]
        for signs, state in zip(shown, (found.before, found.after), strict=True):
            signs |= {"found_again": state.anomaly_index, "success": state.success}
            signs |= {f"targeted_{name}": share for name, share in state.targeted.items()}
            signs |= {f"untargeted_{name}": share for name, share in state.untargeted.items()}
        if found.drift is not None:
            shown[1]["drift"] = found.drift
        left = None
        if evidence and evidence.trigger:
            left = battery.battery(run.model, after, evidence, seed=run.seed, watch=run.parts)
        return run.end(
            {}, other=cleaned.info, verdict=found.verdict(run.survey.anomaly_threshold), battery=left,
            before=measured(run.model, evidence, signs=shown[0]),
            after=measured(after, evidence, run.model, signs=shown[1]),
            data=evidence.name if evidence else None,
            trigger=evidence.trigger.name if evidence and evidence.trigger else None,
            target=evidence.one_target if evidence else None,
        )  # fmt: skip


def _ready(suspect: Suspect, where: torch.device) -> Classifier:
    """A copy of the model, on the device: the caller's stays as it is."""
    return copy.deepcopy(suspect.classifier).to(where).eval()


class _Search:
    """A search in its folder, from its settings to its record."""

    def __init__(self, suspect: Suspect, kind: Literal["scan", "verify"], options: Searching) -> None:
        self.kind: Literal["scan", "verify"] = kind
        self.info, self._warnings = suspect.info, list(suspect.warnings)
        self.few = self.info.classes < FEW
        if self.few:
            self._warnings.append(f"with {self.info.classes} classes it can hardly be told whether one stands out")
        preset = PRESETS["fast"]
        assert isinstance(preset, Survey)
        self.survey, self.seed = options.get("survey", preset), options.get("seed", 0)
        self.survey.check(self.info.input)
        self.where = machine.device(options.get("device", "auto"))
        self.precision: Precision = machine.precision(options.get("precision", "auto"), self.where, exact=False)
        self.model = _ready(suspect, self.where)
        self._inputs = [*suspect.files, *options.get("inputs", ())]
        self.contradicted = suspect.claimed and claims.contradicted(self.model)
        if self.contradicted:
            self._warnings.append(
                "the mean and std that the file claims contradict its BatchNorm statistics, and a model that is fed wrongly "
                "answers no trigger: give --mean and --std"
            )
        self._out, self._overwrite = options.get("out"), options.get("overwrite", False)
        self._watch = options.get("watch", lambda number, round: None)
        self.parts = options.get("parts", lambda done, total: None)
        self._curve: list[dict[str, float]] = []

    def __enter__(self) -> "_Search":
        self._folder = self._opened()
        self._held = self._folder.__enter__()
        self._began = time.monotonic()
        machine.forget_peak(self.where)
        return self

    def __exit__(self, *error: Any) -> None:
        self._folder.__exit__(*error)

    def _opened(self) -> Any:
        if not self._out:
            return nullcontext()
        settings = {"kind": self.kind, "sha256": self.info.sha256, "seed": self.seed, "precision": self.precision}
        settings |= asdict(self.survey)
        return runs.opened(self._out, settings, inputs=self._inputs, overwrite=self._overwrite)

    def fitting(self, search: Callable[[Survey], Found]) -> Found:
        """What a search comes to, begun anew with half the batch where memory does not suffice."""
        asked, halvings = self.survey, 0
        while True:
            self.survey = halving.halved(asked, halvings)
            try:
                found = search(self.survey)
                break
            except (MemoryError, RuntimeError) as error:
                if not halving.fits_with_less(error, self.survey, halvings):
                    raise
            halvings += 1
            self._curve.clear()
            machine.forget_peak(self.where)
        self._warnings += halving.remarks(asked, halvings)
        return found

    def watch(self, number: int, round: Round) -> None:
        """Notes a round."""
        self._curve.append({"iteration": number, **{name: float(x) for name, x in round.items()}})
        self._watch(number, round)
        if self._held and self._held.stopping:
            raise KeyboardInterrupt

    def end(self, pictures: dict[str, bytes], **found: Any) -> Outcome:
        """The record, and the files of the folder."""
        record = Record(
            kind=self.kind, model=self.info, seconds=time.monotonic() - self._began, iterations=len(self._curve),
            defense={"name": "dhbe", "preset": "fast", **asdict(self.survey)}, curve=self._curve, seed=self.seed,
            device=machine.device_name(self.where), precision=self.precision, versions=machine.versions(),
            memory=machine.peak_memory(self.where), warnings=self._warnings, finished=machine.now(), **found,
        )  # fmt: skip
        if self._held:
            with self._held.finishing() as folder:
                files.write(folder / runs.REPORT, report.render(record, pictures))
                records.write(folder / runs.RECORD, record)
        return Outcome(record, pictures)
