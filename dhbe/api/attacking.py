"""Training of backdoored classifiers to practise on."""

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from dhbe import files, foreign, networks, records, report, runs, state_file, suspects
from dhbe.api import machine
from dhbe.api.course import SavedRounds, misfit
from dhbe.attacks import Attack, Backdoor, Workshop
from dhbe.checkpoint import State
from dhbe.classifier import Classifier
from dhbe.data import KNOWN, Images
from dhbe.errors import Failed, Refused
from dhbe.evaluation import measuring
from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.measuring import measured
from dhbe.flags import told
from dhbe.records import Measures, ModelInfo, Record
from dhbe.run_state import RunState
from dhbe.suspects import Suspect
from dhbe.training import Fit

BACKDOORED = Attack.weights
TRIGGER = "trigger.json"

JUDGING = ("min_asr", "max_drop")
"""Settings of an attack that define its success and affect no weight."""


def attack(
    how: Attack,
    train: Images,
    test: Images,
    *,
    arch: str,
    out: str | Path,
    data: str = "",
    fit: Fit = Fit(epochs=30),  # noqa: B008 (frozen)
    seed: int = 0,
    device: str = "auto",
    precision: machine.Precision = "fp32",
    clean: Suspect | None = None,
    fine_tune: bool = False,
    force: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: float = 10.0,
    inputs: Sequence[Path] = (),
    watch: Callable[[dict[str, float]], None] = lambda epoch: None,
    command: str | None = None,
) -> Record:
    """Trains a backdoored classifier to practise on; writes model, trigger and record into `out`.

    Args:
        how: The attack.
        train: Clean training images; they are not changed.
        test: Images to measure ACC and ASR on; the attack never sees them.
        arch: Architecture (see `networks.build`).
        out: Folder for the results.
        data: Name of the data, for the record; for a name in `KNOWN`, images are normalised with its constants.
        fit: Hyperparameters of the training.
        seed: Seed of everything random.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        precision: `fp32`, `bf16`, or `auto`: bf16 where the device supports it natively.
        clean: A clean classifier: Trojaning starts from it, and ACC is compared with its ACC.
        fine_tune: Start every training from the clean classifier's weights; a few epochs then plant the backdoor.
        force: Keep the model even if the attack misses the ASR or ACC it expects; the record says so.
        resume: Resume the interrupted run in `out` from the last saved epoch, with exactly the same resulting weights.
        overwrite: Start over; what `out` holds is kept until the new results are complete.
        checkpoint_every: Minimum number of seconds between two saved states; states are saved after epochs.
        inputs: Further input files besides the clean model's; none is ever overwritten.
        watch: Called after each epoch with its losses, its number among all epochs of the attack, and the seconds `left`.
        command: The command line, for the record.

    Returns:
        The record, with ACC in [0, 1] and ASR in [0, 1].

    Raises:
        Refused: Data, architecture and attack do not fit together.
        Failed: The attack missed the ASR or ACC that it expects, and `force` is not set. The saved state is kept, and
            `resume` with `force` accepts it; trainings shorter than `checkpoint_every` save none.
        Interrupted: The user interrupted the run; its state is saved.
    """
    out = Path(out)
    if train.shape != test.shape or train.classes != test.classes:
        raise Refused(
            f"training images have shape {train.shape} and {train.classes} classes, "
            f"test images {test.shape} and {test.classes}: they must agree"
        )
    how.target_in(train.classes)
    if fine_tune and not clean:
        raise Refused("--fine-tune needs a clean model: give --clean")
    if clean:
        measuring.check(Evidence(test), clean.info)
        if clean.info.arch != arch or clean.info.classes != train.classes:
            raise Refused(
                f"the clean model is a {clean.info.arch} with {clean.info.classes} classes, "
                f"the attack trains a {arch} with {train.classes}: they must agree"
            )
    where = machine.device(device)
    computed = machine.precision(precision, where, exact=False)
    settings = _asked(how, fit, arch, data, seed, computed, clean.info.sha256 if clean else None, fine_tune)
    content = hashlib.sha256(train.pixels.numpy().tobytes() + train.labels.numpy().tobytes()).hexdigest()
    mean, std = (clean.info.mean, clean.info.std) if clean else _constants(train, data)
    contiguous = arch not in networks.ZOO and not networks.takes_channels_last(
        networks.build(arch, train.classes, train.shape), train.shape
    )
    read = [*(clean.files if clean else ()), *inputs]
    with (
        runs.opened(
            out, {**settings, "images_sha256": content, "device": where.type}, inputs=read,
            results=[how.weights, TRIGGER], resume=resume, overwrite=overwrite, every=checkpoint_every,
            command=command,
        ) as run,
        torch.random.fork_rng(),
    ):  # fmt: skip
        if run.finished:
            return _finished(out, settings)
        torch.manual_seed(seed)
        start = copy.deepcopy(clean.classifier).to(where) if clean else None
        course = _Course(run, how.trainings(fit, clean=clean is not None), watch)

        def fresh() -> Classifier:
            if start and fine_tune:
                return copy.deepcopy(start)
            network = networks.build(arch, train.classes, train.shape)
            return Classifier(
                network, shape=train.shape, classes=train.classes, mean=mean, std=std, contiguous=contiguous
            ).to(where)

        with course.stopped_at_once(), run.going_on():
            made = how.plant(train, Workshop(fit, fresh, seed, start, course.look, computed, course.training))
            evidence = Evidence(test, data, made.trigger, made.target, made.source)
            after = measured(made.classifier, evidence)
            control = made.clean or start
            missed = _missed(how, after, measured(control, Evidence(test)) if control else None)
        if missed and not force:
            kept = f"; the trained state is kept in {foreign.name(out)}: add --resume and --force to accept it as it is"
            raise Failed(f"{missed.flagged}{kept if (out / runs.CHECKPOINT).exists() else ''}")
        made.classifier.to("cpu")
        info = ModelInfo(
            path=how.weights,
            sha256=None,
            arch=arch,
            classes=train.classes,
            input=train.shape,
            mean=mean,
            std=std,
            names=train.names,
        )
        with run.finishing() as folder:
            network = made.classifier.network
            suspects.save(folder / how.weights, network, State(dict(network.state_dict()), "", "", ""), info)
            if made.trigger:
                files.write(folder / TRIGGER, made.trigger.to_json())
            record = Record(
                kind="attack", command=command, model=info.model_copy(update={"sha256": files.sha256(folder / how.weights)}),
                attack={"name": how.name, **asdict(how), "poisoned": len(made.chosen), "fit": asdict(fit),
                        "clean": settings["clean"], "fine_tune": fine_tune}, data=data,
                trigger=made.trigger.name if made.trigger else None, target=evidence.one_target, before=after,
                seconds=course.seconds(), iterations=course.epochs, device=machine.device_name(where),
                precision=computed, versions=machine.versions(), seed=seed,
                warnings=[told(each, command) for each in (*train.notes, *([missed.flagged] if missed else []))],
                finished=machine.now(),
            )  # fmt: skip
            files.write(folder / runs.REPORT, report.render(record, _shown(made, test)))
            records.write(folder / runs.RECORD, record)
    return record


def _asked(
    how: Attack, fit: Fit, arch: str, data: str, seed: int, precision: str, clean: str | None, fine_tune: bool
) -> dict[str, Any]:
    """Everything that the weights depend on, except the device and the images."""
    planted = {name: value for name, value in asdict(how).items() if name not in JUDGING}
    return {
        "attack": how.name, **planted, "arch": arch, "data": data, "fit": asdict(fit), "seed": seed,
        "precision": precision, "clean": clean, "fine_tune": fine_tune,
    }  # fmt: skip


def _finished(folder: Path, asked: dict[str, Any]) -> Record:
    """The record in the folder, if it belongs to the same run."""
    record = records.read(folder / runs.RECORD)
    if record.kind != "attack" or record.attack is None:
        raise Refused(f"{folder} holds a finished run of another kind ({record.kind}): choose another --out")
    told = {name: value for name, value in record.attack.items() if name not in ("name", "poisoned", *JUDGING)}
    then = {
        "attack": record.attack["name"], **told, "arch": record.model.arch, "data": record.data, "seed": record.seed,
        "precision": record.precision,
    }  # fmt: skip
    runs.refuse_other(f"{folder} holds a finished run", then, asked)
    return record


class _Saved(BaseModel):
    """Schema of the state that `_Course` saves."""

    model_config = ConfigDict(allow_inf_nan=False)

    trainings: Annotated[list[SavedRounds], Field(min_length=1)]
    seconds: Annotated[float, Field(ge=0)]
    replaces: str
    settings: str


class _Course:
    """Progress of an attack's trainings, saved in its folder so that an interrupted attack can resume."""

    def __init__(
        self, run: runs.Run, trainings: Sequence[tuple[Fit, float]], watch: Callable[[dict[str, float]], None]
    ) -> None:
        if run.saved and (wrong := misfit(run.saved, _Saved)):
            raise state_file.unusable(run.folder / runs.CHECKPOINT, wrong)
        self._saved: list[dict[str, Any]] = run.saved["trainings"] if run.saved else []
        """Saved states of trainings that this process has not reached yet."""
        self._done: list[dict[str, Any]] = []
        self._now: RunState | None = None
        self._run, self._watch = run, watch
        self._costs = [0.0, *accumulate(factor * cost for fit, factor in trainings for cost in fit.costs())]
        """Cumulative cost of the first n epochs."""
        self._spent = run.saved["seconds"] if run.saved else 0.0
        self._began = self._trains = time.monotonic()
        self._from: tuple[float, float] | None = None
        """When this process began to train, and the cumulative cost of the epochs before."""

    def seconds(self) -> float:
        return self._spent + time.monotonic() - self._began

    @property
    def epochs(self) -> int:
        """Number of epochs done in all trainings."""
        return sum(each["round"] for each in self._done) + (self._now.round if self._now else 0)

    @contextmanager
    def training(self) -> Iterator[RunState]:
        """One training; its state is kept for those after it."""
        self._now = RunState(self._saved.pop(0) if self._saved else None)
        self._trains = time.monotonic()
        yield self._now
        self._now.release("optimizer")
        self._done.append(copy.deepcopy(self._now.state()))  # the attack may change the weights afterwards
        self._now = None
        if not self._saved and not self._run.at_once:
            self._keep(last=self.seconds() > self._run.every)  # quick trainings are not worth saving

    @contextmanager
    def stopped_at_once(self) -> Iterator[None]:
        """Stops at once on interruption, instead of after the epoch, whose progress would be lost anyway."""
        self._run.at_once = True
        try:
            if self._run.stopping:
                raise KeyboardInterrupt
            yield
        finally:
            self._run.at_once = False

    def look(self, epoch: dict[str, float]) -> None:
        """Called after each epoch of a training."""
        done = self.epochs
        self._from = self._from or (self._trains, self._costs[done - 1])
        began, before = self._from
        pace = (time.monotonic() - began) / (self._costs[done] - before)
        self._watch({**epoch, "epoch": done, "left": pace * (self._costs[-1] - self._costs[done])})
        self._run.restored = None
        self._keep()

    def _keep(self, *, last: bool = False) -> None:
        self._run.at_once = False
        self._run.at_once = self._run.keep(self._state, last=last)

    def _state(self) -> dict[str, Any]:
        trainings = [*self._done, *([self._now.state()] if self._now else [])]
        return {"trainings": trainings, "seconds": self.seconds()}


def _constants(train: Images, data: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels in [0, 1]: those known for the data's name, or the data's own."""
    known = KNOWN.get(data)
    if known and known.mean and known.std and len(known.mean) == train.shape[0]:
        return known.mean, known.std
    pixels = train.pixels.flatten(2).transpose(0, 1).flatten(1).double() / 255
    return tuple(pixels.mean(1).tolist()), tuple(pixels.std(1).clamp_min(1e-3).tolist())


def _missed(how: Attack, after: Measures, clean: Measures | None) -> Failed | None:
    try:
        how.confirm(after.asr, after.acc, clean.acc if clean else None)
    except Failed as failure:
        return failure
    return None


def _shown(made: Backdoor, test: Images) -> dict[str, bytes]:
    """Pictures of the trigger on a grey image and on some test images."""
    if made.trigger is None:
        return {}
    some = test.float(slice(16))
    return {
        "trigger": report.grid(made.trigger(0.5 + 0 * some[:1]), scale=4),
        "stamped": report.grid(made.trigger(some)),
    }
