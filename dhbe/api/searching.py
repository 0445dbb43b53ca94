"""Data-free answers about a classifier: is it backdoored, and is a backdoor gone?"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, TypeVar, Unpack

import torch
from torch import nn

from dhbe import files, records, report, runs, settings, suspects
from dhbe.api import halving, judging, machine
from dhbe.api.course import Course, asked, identity
from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.errors import Refused
from dhbe.evaluation import battery, measuring
from dhbe.evaluation.doubts import doubts
from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.measuring import measured
from dhbe.flags import told
from dhbe.records import UNSEARCHED, ClassFound, Measures, ModelInfo, Record, Verdict
from dhbe.run_state import RunState
from dhbe.search import scan as search
from dhbe.search import verify as both
from dhbe.search.families import SENTENCES
from dhbe.search.narrowed import SUSPICIOUS
from dhbe.search.search import FEW
from dhbe.search.statistics import ACCUSED, STATISTICS
from dhbe.search.survey import Survey
from dhbe.steps import Precision, Round, Tell, untold
from dhbe.suspects import Suspect

Found = TypeVar("Found")

Watch = Callable[[int, Round], None]

UNLIKELY = 0.35
"""Largest probability of a backdoor with which the verdict is `nothing found`."""


class Searching(TypedDict):
    """Options of a search; all are optional."""

    survey: NotRequired[Survey]
    """Hyperparameters of the search (default: those of `Survey()`)."""
    seed: NotRequired[int]
    """Seed of everything random (default: 0)."""
    device: NotRequired[str]
    """`auto` (default), `cpu`, `cuda`, `cuda:1`, ..."""
    precision: NotRequired[machine.Precision]
    """`fp32`, `bf16`, or `auto` (default): bf16 where the device supports it natively."""
    out: NotRequired[str | Path | None]
    """Folder for record, report and checkpoint; None (default) keeps everything in memory."""
    resume: NotRequired[bool]
    """Resume the interrupted search in `out`."""
    overwrite: NotRequired[bool]
    """Start over; what `out` holds is kept until the new results are complete."""
    checkpoint_every: NotRequired[float]
    """Seconds between two checkpoints (default: 30)."""
    inputs: NotRequired[Sequence[Path]]
    """Further input files besides the models' own; none is ever overwritten."""
    watch: NotRequired[Watch]
    """Called after every round with its number, from 1, and its losses."""
    parts: NotRequired[Tell]
    """Called during long work between rounds, and the battery, with its name, the step, and the number of steps."""
    command: NotRequired[str | None]
    """The command line, for the record."""


@dataclass(frozen=True)
class Outcome:
    """The result of a search."""

    record: Record
    pictures: dict[str, bytes]
    """PNG files for the report."""

    def __repr__(self) -> str:
        return f"Outcome({report.line(self.record)})"

    def _repr_html_(self) -> str:
        """The report, as a notebook shows it."""
        return report.framed(self.record, self.pictures)


def scan(
    model: nn.Module | Suspect,
    *,
    input_shape: Shape | None = None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    **options: Unpack[Searching],
) -> Outcome:
    """Searches a classifier for a backdoor, without data.

    Args:
        model: The suspect network, which takes normalised images, or what `suspects.load` returned.
        input_shape: Image shape (channels, height, width), as in `erase`; not for a `Suspect`, which has its own.
        mean: Mean of each channel, as in `erase`.
        std: Standard deviation of each channel, as in `erase`.
        **options: See `Searching`.

    Raises:
        Refused: The model or the settings cannot be used, or the folder holds another run.
    """
    suspect = suspects.of(model, input_shape, mean, std)
    with _Search(suspect, "scan", options, lambda survey: survey.rounds) as run:
        if run.finished:
            return run.finished
        found = run.fitting(
            lambda survey, run_state: search.scan(
                run.model, survey, seed=run.seed, precision=run.precision, watch=run.watch, tell=run.parts,
                run_state=run_state,
            )
        )  # fmt: skip
        label, index = found.suspected_class, float(found.indices.max())
        chance = search.probability(index)
        backdoored = index > run.survey.anomaly_threshold
        accused, most = int(found.labels[found.fused.argmax()]), float(found.fused.max())
        doubted = chance > UNLIKELY or most >= ACCUSED or run.few
        if most >= ACCUSED and (not backdoored or accused != label):
            run.note(
                f"trigger-free statistics accuse class {accused} (evidence {most:.2f}, 1 or more accuses), but no trigger "
                f"was found that explains it"
            )
        if len(found.labels) < run.info.classes:
            run.note(
                f"{len(found.labels)} of {run.info.classes} classes were searched: the {SUSPICIOUS} most suspicious by quick "
                "statistics, and random others for comparison"
            )
        signs = {"anomaly_index": index, "suspected_class": label, "probability": chance, "evidence": most}
        return run.end(
            _pictures(found), "backdoored" if backdoored else "unclear" if doubted else "nothing found",
            before=Measures(signs=signs), classes=_by_class(found, run.info.classes), backdoored=backdoored,
        )  # fmt: skip


def _by_class(found: search.Found, classes: int) -> list[ClassFound]:
    """What was found for each class of the model; of one that was not searched, nothing."""
    each = zip(
        found.labels.tolist(), found.indices.tolist(), found.families, found.margins.tolist(),
        found.success_rates.tolist(), found.evidence.T.tolist(), found.fused.tolist(), strict=True,
    )  # fmt: skip
    searched = {
        label: ClassFound(
            index=index, family=family, margin=margin, success_rate=rate, evidence=evidence,
            statistics={name: x for name, x in zip(STATISTICS, told, strict=True) if x == x},
        )
        for label, index, family, margin, rate, told, evidence in each
    }  # fmt: skip
    unsearched = ClassFound(index=0.0, family=UNSEARCHED, margin=0.0, success_rate=0.0)
    return [searched.get(number, unsearched) for number in range(classes)]


def _pictures(found: search.Found) -> dict[str, bytes]:
    """The strongest trigger, that of each class, and the strongest one on some images."""
    grey = torch.full_like(found.pixels[:1], 0.5).expand(len(found.labels), -1, -1, -1)
    strongest = found.triggers[[int(found.indices.argmax())]]
    return {
        "found": report.grid(strongest(grey[:1]).cpu(), scale=6),
        "found_each": report.grid(found.triggers(grey).cpu(), scale=4),
        "stamped": report.grid(strongest(found.pixels[:16]).cpu()),
    }


def verify(
    before: nn.Module | Suspect,
    after: nn.Module | Suspect,
    *,
    input_shape: Shape | None = None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    evidence: Evidence | None = None,
    **options: Unpack[Searching],
) -> Outcome:
    """Searches a suspect classifier and its cleaned version for what is left of a backdoor, without data.

    Args:
        before: The suspect network, as in `scan`.
        after: The cleaned network, with the same classes and image shape.
        input_shape: Image shape, as in `scan`.
        mean: Mean of each channel, as in `scan`.
        std: Standard deviation of each channel, as in `scan`.
        evidence: Labelled images to measure on; with a trigger, the battery of residual risks is measured too.
        **options: See `Searching`.

    Raises:
        Refused: The models do not fit together or to the data, or the settings cannot be used.
    """
    suspect, cleaned = (suspects.of(model, input_shape, mean, std) for model in (before, after))
    if (suspect.info.classes, suspect.info.input) != (cleaned.info.classes, cleaned.info.input):
        raise Refused(
            f"the models have {suspect.info.classes} classes and input {suspect.info.input}, and {cleaned.info.classes} and "
            f"{cleaned.info.input}: give two states of one model"
        )
    if evidence:
        measuring.check(evidence, suspect.info)
    options["inputs"] = [*cleaned.files, *options.get("inputs", ())]
    with _Search(suspect, "verify", options, both.rounds, cleaned, evidence) as run:
        if run.finished:
            return run.finished
        model_after = _ready(cleaned, run.where)
        found = run.fitting(
            lambda survey, run_state: both.compare(
                run.model, model_after, survey, seed=run.seed, precision=run.precision, watch=run.watch, tell=run.parts,
                run_state=run_state,
            )
        )  # fmt: skip
        shown = [
            {"anomaly_index": found.index, "suspected_class": found.suspected_class},
            {"agreement": found.agreement},
        ]
        for signs, state in zip(shown, (found.before, found.after), strict=True):
            signs |= {"found_again": state.anomaly_index, "success_rate": state.success_rate}
            signs |= {f"targeted_{name}": share for name, share in state.targeted.items()}
            signs |= {f"untargeted_{name}": share for name, share in state.untargeted.items()}
        if found.drift is not None:
            shown[1]["drift"] = found.drift
        left, was = None, measured(run.model, evidence, signs=shown[0])
        if evidence:
            run.note(*evidence.images.notes, *doubts(run.model, evidence, was))
        if evidence and evidence.trigger:
            left = battery.battery(run.model, model_after, evidence, seed=run.seed, tell=run.parts)
        return run.end(
            {}, found.verdict(run.survey.anomaly_threshold),
            other=cleaned.info, battery=left, before=was,
            after=measured(model_after, evidence, run.model, signs=shown[1]),
            data=evidence.name if evidence else None,
            trigger=evidence.trigger.name if evidence and evidence.trigger else None,
            target=evidence.one_target if evidence else None,
        )  # fmt: skip


def _asked(
    kind: str, info: ModelInfo, other: ModelInfo | None, told: dict[str, Any], seed: int, precision: str
) -> dict[str, Any]:
    """Everything that a search's result depends on, except the device."""
    compared = {f"after_{name}": value for name, value in identity(other).items()} if other else {}
    return {"kind": kind, **asked(info, told, seed, precision), **compared}


def _ready(suspect: Suspect, where: torch.device) -> Classifier:
    """A copy of the model on the device, in eval mode."""
    return copy.deepcopy(suspect.classifier).to(where).eval()


class _Search:
    """A search in its folder, from its settings to its record."""

    def __init__(
        self,
        suspect: Suspect,
        kind: Literal["scan", "verify"],
        options: Searching,
        rounds: Callable[[Survey], int],
        other: Suspect | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        self.kind: Literal["scan", "verify"] = kind
        self.info, self._suspect, self._warnings = suspect.info, suspect, list(suspect.flagged)
        self.few = self.info.classes < FEW
        if self.few:
            self._warnings.append(f"with only {self.info.classes} classes, it is hard to tell whether one stands out")
        self.survey, self.seed = options.get("survey", Survey()), options.get("seed", 0)
        self.survey.check(self.info.input)
        self.where = machine.device(options.get("device", "auto"))
        self.precision: Precision = machine.precision(options.get("precision", "auto"), self.where, exact=False)
        self.model = _ready(suspect, self.where)
        self._rounds, self._options, self._inputs = rounds, options, [*suspect.files, *options.get("inputs", ())]
        self._command = options.get("command")
        self._watch = options.get("watch", lambda number, round: None)
        self.parts = options.get("parts", untold)
        self._told = {"name": "dhbe", "preset": "fast", **settings.flat(self.survey)}
        self._asked = _asked(kind, self.info, other.info if other else None, self._told, self.seed, self.precision)
        self._evidence = evidence
        self.finished: Outcome | None = None
        """The result in the folder, if the search was finished there already."""

    def __enter__(self) -> "_Search":
        out = self._options.get("out")
        self._folder = (
            runs.opened(
                Path(out), {**self._asked, "device": self.where.type}, inputs=self._inputs,
                resume=self._options.get("resume", False), overwrite=self._options.get("overwrite", False),
                every=self._options.get("checkpoint_every", 30.0), command=self._command,
            ) if out else nullcontext()
        )  # fmt: skip
        self._held = self._folder.__enter__()
        try:
            if self._held and self._held.finished:
                self.finished = self._read(self._held.folder)
            else:
                self._course = Course(self._held, self._rounds(self.survey))
        except BaseException as error:
            self._folder.__exit__(type(error), error, error.__traceback__)
            raise
        machine.forget_peak(self.where)
        return self

    def __exit__(self, *error: Any) -> None:
        self._folder.__exit__(*error)

    def _read(self, folder: Path) -> Outcome:
        """The result in the folder, if it belongs to the same search."""
        record = records.read(folder / runs.RECORD)
        if record.kind != self.kind or record.defense is None:
            raise Refused(f"{folder} holds a finished run of another kind ({record.kind}): choose another --out")
        then = _asked(self.kind, record.model, record.other, record.defense, record.seed, record.precision)
        runs.refuse_other(f"{folder} holds a finished run", then, self._asked)
        measured_on = self._evidence.name if self._evidence else None
        if measured_on != record.data:
            raise Refused(
                f"{folder} holds a finished run that was measured on {record.data or 'no data'}: choose another --out"
            )
        return Outcome(record, {})

    def fitting(self, search: Callable[[Survey, RunState], Found]) -> Found:
        """The result of a search, restarted with half the batch if memory runs out."""
        asked, course = self.survey, self._course
        while True:
            self.survey = halving.halved(asked, course.halvings)
            try:
                with course.going_on():
                    found = search(self.survey, course.run_state)
                break
            except (MemoryError, RuntimeError) as error:
                if not halving.fits_with_less(error, self.survey, course.halvings):
                    raise
            course.anew()
            machine.forget_peak(self.where)
        course.end()
        if self._held:
            self._held.at_once = True  # the state is saved, and no round follows
        self._told |= halving.recorded(asked, course.halvings)
        self.note(*halving.remarks(asked, course.halvings))
        return found

    def watch(self, number: int, round: Round) -> None:
        """Records a round."""
        self._course.add(number, round)
        self._watch(number, round)
        self._course.keep()

    def note(self, *lines: str) -> None:
        """Adds to the warnings of the record."""
        self._warnings += lines

    def end(self, pictures: dict[str, bytes], verdict: Verdict, **found: Any) -> Outcome:
        """Makes the record and writes the folder's files."""
        judged, doubt = judging.judged(verdict, self._suspect)
        record = Record(
            kind=self.kind, model=self.info, verdict=judged, doubt=doubt and told(doubt, self._command), command=self._command,
            seconds=self._course.seconds(), iterations=len(self._course.curve), defense=self._told, families=SENTENCES,
            statistics=STATISTICS, curve=self._course.curve, seed=self.seed,
            device=machine.device_name(self.where), precision=self.precision, versions=machine.versions(),
            memory=machine.peak_memory(self.where),
            warnings=[told(each, self._command) for each in self._warnings], finished=machine.now(), **found,
        )  # fmt: skip
        if self._held:
            with self._held.finishing() as folder:
                files.write(folder / runs.REPORT, report.render(record, pictures))
                records.write(folder / runs.RECORD, record)
        return Outcome(record, pictures)
