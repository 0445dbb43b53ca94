"""One run of a defence: measures the model before and after, saves states at intervals, writes the record."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from dhbe import checkpoint, files, formats, ranks, records, report, runs, settings, suspects
from dhbe.api import halving, judging, machine
from dhbe.api.course import Course, asked
from dhbe.classifier import Classifier
from dhbe.defenses import Defense, Eraser, FastDHBE, Known, RoundInfo, Samples
from dhbe.errors import Failed, Refused
from dhbe.evaluation import measuring
from dhbe.evaluation.doubts import doubts
from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.measuring import measured
from dhbe.flags import told
from dhbe.records import Record
from dhbe.run_state import RunState
from dhbe.search.families import SENTENCES
from dhbe.steps import Precision, Tell, untold
from dhbe.suspects import Suspect

Watch = Callable[[RoundInfo], None]

CLEAN, ONNX = "clean.safetensors", "clean.onnx"

LOOKED_AT = 512
"""Number of generated images for the data-free signs."""


class Options(TypedDict, total=False):
    """Options of every run of a defence; all are optional."""

    seed: int
    """Seed of everything random (default: 0)."""
    device: str
    """`auto` (default), `cpu`, `cuda`, `cuda:1`, ..."""
    precision: machine.Precision
    """`fp32`, `bf16`, or `auto` (default): bf16 for `fast` where the device supports it natively, else fp32."""
    evidence: Evidence | None
    """Data to measure ACC and ASR on, before and after. The defence never sees it."""
    out: str | Path | None
    """Folder for the results and the checkpoint; None (default) keeps everything in memory."""
    resume: bool
    """Resume the interrupted run in `out`."""
    overwrite: bool
    """Start over; what `out` holds is kept until the new results are complete."""
    inputs: Sequence[Path]
    """Further input files besides the model's own; none is ever overwritten."""
    budget: float | None
    """Minutes after which `fast` begins no further cycle (default: none); a cycle that has begun is finished."""
    also: Literal["onnx"] | None
    """An additional format in which the cleaned model is written (default: none)."""
    checkpoint_every: float
    """Seconds between two checkpoints (default: 30)."""
    watch: Watch
    """Called after every round."""
    parts: Tell
    """Called during long work between rounds with its name, the step, from 1, and the number of steps."""
    command: str | None
    """The command line, for the record."""


@dataclass(frozen=True, eq=False)
class Erasure:
    """The result of `erase` and `defend`."""

    model: nn.Module
    """The cleaned network, of the same class and on the same device as the one given, in eval mode."""
    record: Record
    """What was done and measured."""
    pictures: dict[str, bytes]
    """PNG files for the report."""

    def __repr__(self) -> str:
        return f"Erasure({report.line(self.record)})"

    def _repr_html_(self) -> str:
        """The report, as a notebook shows it."""
        return report.framed(self.record, self.pictures)


def run(
    suspect: Suspect,
    defense: Defense,
    known: Known,
    named: dict[str, Any],
    *,
    exact: bool,
    seed: int = 0,
    device: str = "auto",
    precision: machine.Precision = "auto",
    evidence: Evidence | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    budget: float | None = None,
    also: Literal["onnx"] | None = None,
    checkpoint_every: float = 30.0,
    watch: Watch = lambda round_info: None,
    parts: Tell = untold,
    command: str | None = None,
) -> Erasure:
    """Runs a defence on a suspect model, which is not changed.

    The defence gets `known` besides the model. `named` are the record's entries before the hyperparameters: the defence's
    name, and what else it was given. If a paper is followed `exact`ly, `auto` precision means fp32. The other arguments are
    documented in `Options`.

    Raises:
        Refused: The model or the settings cannot be used.
        Failed: The run diverged, or its results could not be written.
    """
    if ranks.size() > 1 and resume:
        raise Refused("--resume needs a single process, with the same result: run it without torchrun")
    if ranks.size() > 1 and budget is not None:
        raise Refused("--budget needs a single process, whose clock it goes by: run it without torchrun")
    if ranks.rank():  # only the first process measures, writes and prints
        evidence, out, watch, parts = None, None, _unwatched, untold
    out = Path(out) if out is not None else None
    where = machine.device(device)
    how = machine.precision(precision, where, exact=exact)
    defense.check(suspect.info.input)
    if budget is not None and not isinstance(defense, FastDHBE):
        raise Refused("--budget ends a run between cycles, and only the preset fast has cycles: leave it out")
    if budget is not None and not budget > 0:
        raise Refused(f"--budget {budget:g}: it must be above 0 minutes")
    if evidence:
        measuring.check(evidence, suspect.info)
    container = suspect.state.container
    wanted = asked(suspect.info, {**named, **settings.flat(defense)}, seed, how)
    with (
        runs.opened(
            out, {**wanted, "device": where.type}, inputs=[*suspect.files, *inputs],
            results=[CLEAN, ONNX, *(container.names if container else ())], resume=resume, overwrite=overwrite,
            every=checkpoint_every, command=command,
        ) if out else nullcontext()
    ) as held:  # fmt: skip
        if held and held.finished:
            return _finished(held.folder, suspect, wanted, evidence)
        home, victim = suspect.classifier.mean.device, copy.deepcopy(suspect.classifier).to(where).eval()
        before = measured(victim, evidence)  # first, so that unusable data is refused before the work
        course, warnings = Course(held, defense.rounds), list(suspect.flagged)
        warnings += (*evidence.images.notes, *doubts(victim, evidence, before)) if evidence else ()
        used, cleaned = _cleaned(
            defense, victim, known, course, seed=seed, precision=how, watch=watch, parts=parts, budget=budget
        )
        course.end()
        seconds = course.seconds()
        with course.going_on():
            then, now, pictures = _looked_at(used, course.run_state, victim, cleaned, seed)
        before = before.model_copy(update={"signs": then})
        after = measuring.rated(before, measured(cleaned, evidence, victim, signs=now))
        recorded = {**named, **halving.recorded(defense, course.halvings)}
        warnings += halving.remarks(defense, course.halvings)
        warnings += used.remarks(course.run_state)
        verdict, doubt = judging.judged(used.verdict(course.run_state), suspect)
        if verdict is None and judging.ineffective(before, after, victim, cleaned):
            verdict = "no effect"
        record = Record(
            kind="erase", model=suspect.info, defense=recorded,
            families=SENTENCES if isinstance(used, FastDHBE) else {},
            data=evidence.name if evidence else None,
            trigger=evidence.trigger.name if evidence and evidence.trigger else None,
            target=evidence.one_target if evidence else None,
            before=before, after=after, seconds=seconds, iterations=len(course.curve),
            device=machine.device_name(where), precision=how, versions=machine.versions(), seed=seed,
            verdict=verdict, doubt=doubt and told(doubt, command), command=command, curve=course.curve, memory=machine.peak_memory(where),
            warnings=[told(each, command) for each in warnings],
            finished=machine.now(),
        )  # fmt: skip
        cleaned.to("cpu")
        if held:
            record = _written(held, cleaned, suspect, record, pictures, also)
        return Erasure(cleaned.to(home).network, record, pictures)


def _cleaned(
    defense: Defense,
    victim: Classifier,
    known: Known,
    course: "Course",
    *,
    seed: int,
    precision: Precision,
    watch: Watch,
    parts: Tell,
    budget: float | None,
) -> tuple[Defense, Classifier]:
    """Runs a defence, again with half the batch as long as memory runs out.

    Returns:
        The defence as it ran in the end, and the cleaned classifier.
    """

    def look(round_info: RoundInfo) -> None:
        course.add(round_info.number, round_info.round)
        watch(round_info)
        course.keep()

    def late() -> bool:
        return budget is not None and course.seconds() >= 60 * budget

    while True:
        used = halving.halved(defense, course.halvings)
        machine.forget_peak(victim.mean.device)
        try:
            with course.going_on():
                return used, used(
                    victim,
                    known,
                    seed=seed,
                    precision=precision,
                    watch=look,
                    tell=parts,
                    late=late,
                    run_state=course.run_state,
                )
        except (MemoryError, RuntimeError) as error:
            if ranks.size() > 1 or not halving.fits_with_less(error, used, course.halvings):
                raise
        course.anew()


def _written(
    held: runs.Run, cleaned: Classifier, suspect: Suspect, record: Record, pictures: Mapping[str, bytes],
    also: Literal["onnx"] | None,
) -> Record:  # fmt: skip
    """Writes all results of a run into its folder; returns the record with the SHA-256 of the cleaned file."""
    container = suspect.state.container
    with held.finishing() as folder:
        suspects.save(folder / CLEAN, cleaned.network, suspect.state, suspect.info)
        record = record.model_copy(update={"result": files.sha256(folder / CLEAN)})
        if container:
            tensors = checkpoint.changed(cleaned.network.state_dict(), suspect.state)
            for name, content in container.content(cleaned.network, tensors).items():
                files.write(folder / name, content)
        if also == "onnx":
            files.write(folder / ONNX, formats.export(cleaned.network, suspect.info.input))
        files.write(folder / runs.REPORT, report.render(record, pictures))
        records.write(folder / runs.RECORD, record)
    return record


def _unwatched(round_info: RoundInfo) -> None:
    """The watcher of processes other than the first."""


def _looked_at(
    defense: Defense, run_state: RunState, victim: Classifier, cleaned: Classifier, seed: int
) -> tuple[dict[str, float], dict[str, float], dict[str, bytes]]:
    """Data-free signs of the victim and of the cleaned model, and pictures for the report."""
    if not isinstance(defense, Eraser):
        return defense.found(run_state), {}, {}
    samples = defense.samples(victim, run_state, LOOKED_AT, seed)
    before, after = (_signs(model, victim, samples) for model in (victim, cleaned))
    pictures = {
        "samples": report.grid(samples.pixels[:32].cpu()),
        "found": report.grid(samples.patches[:1].cpu(), scale=6),
        "triggers": report.grid(samples.patches[:32].cpu(), scale=4),
        "stamped": report.grid(samples.triggered[:32].cpu()),
    }
    return {**before, **defense.found(run_state)}, after, pictures


@torch.inference_mode()
def _signs(model: Classifier, victim: Classifier, samples: Samples) -> dict[str, float]:
    """Data-free signs of a model, on generated images and triggers."""
    told, clean, moved = victim(samples.pixels), model(samples.pixels), model(samples.triggered)
    if not (clean.isfinite().all() and moved.isfinite().all()):
        raise Failed("the model's logits on generated images are not finite: lower --lr, or try another --seed")
    return {
        "agreement": (told.argmax(1) == clean.argmax(1)).sum().item() / len(clean),
        "reaction": (moved - clean).abs().mean().item(),
        "flips": (moved.argmax(1) != clean.argmax(1)).sum().item() / len(clean),
    }


def _finished(folder: Path, suspect: Suspect, wanted: dict[str, Any], evidence: Evidence | None) -> Erasure:
    """The result read back from the folder, if it belongs to the same run."""
    record = records.read(folder / runs.RECORD)
    if record.kind != "erase" or record.defense is None:
        raise Refused(f"{folder} holds a finished run of another kind ({record.kind}): choose another --out")
    then = asked(record.model, record.defense, record.seed, record.precision)
    runs.refuse_other(f"{folder} holds a finished run", then, wanted)
    trigger = evidence.trigger.name if evidence and evidence.trigger else None
    if evidence and (evidence.name, trigger, evidence.one_target) != (record.data, record.trigger, record.target):
        raise Refused(
            f"{folder} holds a finished run that was measured on {record.data or 'no data'} with "
            f"{record.trigger or 'no trigger'}: use dhbe score {folder / CLEAN}, or choose another --out"
        )
    network = copy.deepcopy(suspect.classifier.network)
    clean = checkpoint.read(folder / CLEAN)
    checkpoint.load_into(
        network, replace(clean, where=suspect.state.where, container=suspect.state.container), suspect.info.weights
    )
    return Erasure(network.eval(), record, {})
