"""Every verb of the command line as one call."""

import copy
import hashlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dhbe import checkpoint, diagnostics, files, metrics, networks, records, report, runs, suspects
from dhbe.attacks import Attack, Backdoor, Target, Workshop
from dhbe.attacks.triggers import Trigger
from dhbe.checkpoint import State
from dhbe.classifier import Classifier, evaluating, last
from dhbe.data import KNOWN, Images, Shape, clean_subset
from dhbe.defenses import PEERS, PRESETS, Defense, Eraser, Glimpse, Known, Ledger, Scene
from dhbe.errors import Failed, Refused
from dhbe.records import Measures, ModelInfo, Record
from dhbe.suspects import Suspect
from dhbe.training import Fit, predict

Precision = Literal["auto", "fp32", "bf16"]
Watch = Callable[[Glimpse], None]

CLEAN = "clean.safetensors"
BACKDOORED = "backdoored.safetensors"
TRIGGER = "trigger.json"

LOOKED_AT = 512
"""Generated images on which the data-free signs are taken."""

BOXED = 1000
"""Images, at most, on which activation differences are taken."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Data that a run is measured with, and never handed to a defence."""

    images: Images
    name: str = ""
    trigger: Trigger | None = None
    target: Target | None = None
    """The class that the trigger leads to; "next" is each image's own plus one (all-to-all)."""
    source: int | None = None
    """The only class whose images the trigger is for (one-to-one)."""

    @property
    def one_target(self) -> int | None:
        """The target, if it is the same for all images."""
        return None if self.target == "next" else self.target


@dataclass(frozen=True, eq=False)
class Erasure:
    """What `erase` gives back."""

    model: nn.Module
    """The cleaned network, of the same class as the one given, in eval mode."""
    record: Record
    """What was done and measured."""
    pictures: dict[str, bytes]
    """PNG files for the report."""


def erase(
    model: nn.Module | Suspect,
    *,
    input_shape: Shape | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    preset: str = "fast",
    defense: Eraser | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    evidence: Evidence | None = None,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: float = 30.0,
    watch: Watch = lambda glimpse: None,
) -> Erasure:
    """Gives back a classifier of the same form that no longer answers to a trigger; it needs no data.

    Args:
        model: The suspect network, which takes normalised images, or what `suspects.load` returned. It is not changed.
        input_shape: Image shape (channels, height, width); square, 8 px or more. Not for a `Suspect`, which has its own.
        mean: Mean of each channel that the network's input is normalised with, pixels in [0, 1].
        std: The standard deviation likewise.
        preset: `fast`, `paper` or `official`.
        defense: Hyperparameters; None takes the preset's.
        seed: Seed of everything random.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        precision: `auto` is bf16 for `fast` where the device is made for it, fp32 elsewhere.
        evidence: Data to measure ACC and ASR on, before and after. The defence never sees it.
        out: Folder for the results and the checkpoint; None keeps all in memory.
        resume: Go on with the interrupted run in `out`.
        overwrite: Begin anew over what `out` holds.
        checkpoint_every: Seconds between two checkpoints.
        watch: Called after every round.

    Raises:
        Refused: The model or the settings cannot be used.
        Failed: The run diverged or could not be written.
    """
    suspect = model if isinstance(model, Suspect) else _wrapped(model, input_shape, mean, std)
    if preset not in PRESETS:
        raise Refused(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    defense = defense or PRESETS[preset]
    where = _device(device)
    return _run(
        suspect, defense, Known(), named={"name": "dhbe", "preset": preset}, evidence=evidence, where=where,
        how=_precision(precision, where, exact=preset != "fast"), seed=seed, out=out, resume=resume,
        overwrite=overwrite, checkpoint_every=checkpoint_every, watch=watch,
    )  # fmt: skip


def defend(
    model: nn.Module | Suspect,
    defense: Defense,
    *,
    input_shape: Shape | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    clean: Images | None = None,
    source: str = "",
    images: int = 2000,
    target: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    evidence: Evidence | None = None,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: float = 30.0,
    watch: Watch = lambda glimpse: None,
) -> Erasure:
    """Runs one of the defences of others, which may hold what it says that it needs and nothing else.

    Args:
        model: The suspect network or what `suspects.load` returned, as in `erase`. It is not changed.
        defense: With its hyperparameters.
        input_shape: Image shape, as in `erase`.
        mean: Of each channel, as in `erase`.
        std: The same of the standard deviation.
        clean: Clean images with labels, for a defence that needs them.
        source: Name of the data that `clean` comes from, for the record.
        images: How many of `clean` are lent, chosen by the seed; all if there are fewer.
        target: The target class, for a defence that needs it.
        seed: Seed of everything random.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        precision: `auto` is fp32, as in the papers.
        evidence: Data to measure ACC and ASR on, before and after; never lent.
        out: Folder for the results and the checkpoint; None keeps all in memory.
        resume: Go on with the interrupted run in `out`.
        overwrite: Begin anew over what `out` holds.
        checkpoint_every: Seconds between two checkpoints.
        watch: Called after every round.

    Raises:
        Refused: The model, the settings or what is lent cannot be used.
        Failed: The run diverged or could not be written.
    """
    suspect = model if isinstance(model, Suspect) else _wrapped(model, input_shape, mean, std)
    lent: dict[str, Any] = {}
    if clean is None or "clean images" not in defense.needs:
        clean = None
    else:
        clean = clean_subset(clean, images, seed) if images < len(clean) else clean
        content = hashlib.sha256(clean.pixels.numpy().tobytes() + clean.labels.numpy().tobytes()).hexdigest()
        lent |= {"clean": source, "images": len(clean), "images_sha256": content}
    if target is None or "target class" not in defense.needs:
        target = None
    elif not 0 <= target < suspect.info.classes:
        raise Refused(f"no target class {target}: the model has classes 0 to {suspect.info.classes - 1}")
    else:
        lent["known_target"] = target
    where = _device(device)
    return _run(
        suspect, defense, Known(clean, target), named={"name": defense.name, **lent}, evidence=evidence, where=where,
        how=_precision(precision, where, exact=True), seed=seed, out=out, resume=resume,
        overwrite=overwrite, checkpoint_every=checkpoint_every, watch=watch,
    )  # fmt: skip


def _run(
    suspect: Suspect,
    defense: Defense,
    known: Known,
    *,
    named: dict[str, Any],
    evidence: Evidence | None,
    where: torch.device,
    how: Literal["fp32", "bf16"],
    seed: int,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    checkpoint_every: float,
    watch: Watch,
) -> Erasure:
    """One run of a defence in its folder: measured before and after, saved at intervals, recorded.

    `named` stands before the hyperparameters in the record: the defence's name, and all else that it was given.
    """
    defense.check(suspect.info.input)
    if evidence:
        _check_evidence(evidence, suspect.info)
    if out and suspect.info.path and _same(out / CLEAN, Path(suspect.info.path)):
        raise Refused(f"{out / CLEAN} is the model itself, and would be replaced: give another --out")
    recorded = {**named, **asdict(defense)}
    settings = _settings(suspect.info, recorded, seed, how)
    with (
        runs.opened(
            out, {**settings, "device": where.type}, results=[CLEAN],
            resume=resume, overwrite=overwrite, every=checkpoint_every,
        ) if out else nullcontext()
    ) as run:  # fmt: skip
        if run and run.finished:
            return _finished(run.folder, suspect, settings, evidence)
        victim = suspect.classifier.to(where)
        before = measured(victim, evidence)  # now, so that data which cannot be measured on is refused before the work
        curve: list[dict[str, float]] = run.saved["curve"] if run and run.saved else []
        spent = run.saved["seconds"] if run and run.saved else 0.0
        ledger = Ledger(run.saved["ledger"] if run and run.saved else None)
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        began = time.monotonic()

        def look(glimpse: Glimpse) -> None:
            curve.append({"iteration": glimpse.number, **{name: float(x) for name, x in glimpse.round.items()}})
            _check_finite(curve[-1])
            watch(glimpse)
            if run:
                seconds = spent + time.monotonic() - began
                run.keep(
                    lambda: {"ledger": ledger.state(), "curve": curve, "seconds": seconds},
                    last=glimpse.number == glimpse.total,
                )

        cleaned = defense(victim, known, seed=seed, precision=how, watch=look, ledger=ledger)
        seconds = spent + time.monotonic() - began
        pictures: dict[str, bytes] = {}
        signs = [defense.found(ledger), {}]
        if isinstance(defense, Eraser):
            scene = defense.scene(victim, ledger, LOOKED_AT, seed)
            shown = [_signs(model, victim, scene) for model in (victim, cleaned)]
            signs = [{**shown[0], **defense.found(ledger)}, shown[1]]
            pictures = {
                "samples": report.grid(scene.pixels[:32].cpu()),
                "triggers": report.grid(scene.patches[:32].cpu(), scale=4),
                "stamped": report.grid(scene.triggered[:32].cpu()),
            }
        before = before.model_copy(update={"signs": signs[0]})
        after = _rated(before, measured(cleaned, evidence, victim, signs=signs[1]))
        record = Record(
            kind="erase", model=suspect.info, defense=recorded,
            data=evidence.name if evidence else None,
            trigger=evidence.trigger.name if evidence and evidence.trigger else None,
            target=evidence.one_target if evidence else None,
            before=before, after=after, seconds=seconds, iterations=len(curve),
            device=_device_name(where), precision=how, versions=versions(), seed=seed, curve=curve,
            memory=_peak_memory(where), warnings=list(suspect.warnings), finished=_now(),
        )  # fmt: skip
        cleaned.to("cpu")
        if run:
            suspects.save(run.folder / CLEAN, cleaned.network, suspect.state, suspect.info)
            files.write(run.folder / runs.REPORT, report.render(record, pictures))
            records.write(run.folder / runs.RECORD, record)  # last: a folder with a record is a finished run
            run.close()
        return Erasure(cleaned.network, record, pictures)


def score(suspect: Suspect, evidence: Evidence, *, device: str = "auto") -> Measures:
    """ACC, and with a trigger ASR and amplified ASR.

    Raises:
        Refused: The data, the trigger or the target do not fit the model.
    """
    _check_evidence(evidence, suspect.info)
    found = measured(suspect.classifier.to(_device(device)), evidence)
    return found.model_copy(update={"asr_victim": None})  # who the victim was is not known here


def attack(
    how: Attack,
    train: Images,
    test: Images,
    *,
    arch: str,
    out: Path,
    data: str = "",
    fit: Fit = Fit(epochs=30),  # noqa: B008 (frozen)
    seed: int = 0,
    device: str = "auto",
    clean: Suspect | None = None,
    fine_tune: bool = False,
    force: bool = False,
    overwrite: bool = False,
    watch: Callable[[dict[str, float]], None] = lambda epoch: None,
) -> Record:
    """Trains a backdoored classifier to practise on; writes model, trigger and record into `out`.

    Args:
        how: The attack.
        train: Clean training images; they stay as they are.
        test: Images to measure ACC and ASR on; the attack never sees them.
        arch: Architecture (see `networks.build`).
        out: Folder for the results.
        data: Name of the data, for the record; constants of a name in `KNOWN` normalise the images.
        fit: How to train.
        seed: Seed of everything random.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        clean: A clean classifier: Trojaning starts from it, and ACC is compared with its own.
        fine_tune: Every training starts from the clean classifier's weights; a few epochs plant the backdoor then.
        force: Keep the model even if the attack missed what it expects; the record says so.
        overwrite: Begin anew over what `out` holds.
        watch: Called after each epoch with its number among all epochs of the attack.

    Raises:
        Refused: Data, architecture and attack do not fit together.
        Failed: The attack missed the ASR or ACC that it expects, and `force` is not set.
    """
    began = time.monotonic()
    if train.shape != test.shape or train.classes != test.classes:
        raise Refused(
            f"training images are {train.shape} of {train.classes} classes, "
            f"test images {test.shape} of {test.classes}: they must agree"
        )
    how.target_in(train.classes)
    if fine_tune and not clean:
        raise Refused("to fine-tune there must be a clean model: give --clean MODEL")
    if clean:
        _check_evidence(Evidence(test), clean.info)
        if clean.info.arch != arch or clean.info.classes != train.classes:
            raise Refused(
                f"the clean model is a {clean.info.arch} of {clean.info.classes} classes, "
                f"the attack makes a {arch} of {train.classes}: they must agree"
            )
    where = _device(device)
    settings = {
        "attack": how.name, **asdict(how), "arch": arch, "data": data, "fit": asdict(fit), "seed": seed,
        "clean": clean.info.sha256 if clean else None, "fine_tune": fine_tune,
    }  # fmt: skip
    mean, std = (clean.info.mean, clean.info.std) if clean else _constants(train, data)
    with runs.opened(out, settings, results=[BACKDOORED, TRIGGER], overwrite=overwrite) as run, torch.random.fork_rng():
        torch.manual_seed(seed)
        epochs, start = 0, clean.classifier.to(where) if clean else None

        def fresh() -> Classifier:
            if start and fine_tune:
                return copy.deepcopy(start)
            network = networks.build(arch, train.classes, train.shape)
            return Classifier(network, shape=train.shape, classes=train.classes, mean=mean, std=std).to(where)

        def look(epoch: dict[str, float]) -> None:
            nonlocal epochs
            epochs += 1
            watch({**epoch, "epoch": epochs})
            if run.stopping:
                raise KeyboardInterrupt

        made = how.plant(train, Workshop(fit, fresh, seed, start, look))
        evidence = Evidence(test, data, made.trigger, made.target, made.source)
        after = measured(made.classifier, evidence)
        control = made.clean or start
        missed = _missed(how, after, measured(control, Evidence(test)) if control else None)
        if missed and not force:
            raise missed
        made.classifier.to("cpu")
        info = ModelInfo(
            path=BACKDOORED, sha256=None, arch=arch, classes=train.classes, input=train.shape, mean=mean, std=std
        )
        network = made.classifier.network
        suspects.save(out / BACKDOORED, network, State(dict(network.state_dict()), "", "", ""), info)
        if made.trigger:
            files.write(out / TRIGGER, made.trigger.to_json())
        record = Record(
            kind="attack", model=info.model_copy(update={"sha256": files.sha256(out / BACKDOORED)}),
            attack={"name": how.name, **asdict(how), "poisoned": len(made.chosen), "fit": asdict(fit),
                    "clean": settings["clean"], "fine_tune": fine_tune}, data=data,
            trigger=made.trigger.name if made.trigger else None, target=evidence.one_target, before=after,
            seconds=time.monotonic() - began, iterations=epochs, device=_device_name(where), precision="fp32",
            versions=versions(), seed=seed, warnings=[str(missed)] if missed else [], finished=_now(),
        )  # fmt: skip
        files.write(out / runs.REPORT, report.render(record, _shown(made, test)))
        records.write(out / runs.RECORD, record)
    return record


def measured(
    classifier: Classifier,
    evidence: Evidence | None,
    victim: Classifier | None = None,
    signs: dict[str, float] | None = None,
) -> Measures:
    """Everything that the evidence allows to measure.

    Args:
        classifier: What is evaluated.
        evidence: Images, and perhaps a trigger with its target; None leaves all rates open.
        victim: The backdoored model, for the ASR among images that it gets right; None takes `classifier`.
        signs: Data-free signs to note beside the rates.

    Returns:
        The measures; an ASR is None where the model gets no image right, so that none counts.

    Raises:
        Refused: The data has no image outside the target class.
        Failed: The classifier's logits are not finite.
    """
    if evidence is None:
        return Measures(signs=signs or {})
    images, trigger, target = evidence.images, evidence.trigger, evidence.target
    labels, classes = images.labels, images.classes
    clean, every = predict(classifier, images), torch.ones_like(images.labels, dtype=torch.bool)
    rates: dict[str, Any] = {"acc": metrics.accuracy(clean, labels), "n": len(images)}
    rates["acc_classes"] = metrics.per_class(clean == labels, every, labels, classes)
    rates["acc_interval"] = metrics.wilson(int((clean == labels).sum()), len(images))
    if trigger is not None and target is not None:
        base = clean if victim is None else predict(victim, images)
        rates |= _success(classifier, evidence, trigger, metrics.goals(labels, target, classes), clean, base)
        shown = images.subset(slice(BOXED))
        moved = diagnostics.activation_differences(classifier, shown, trigger)
        rates["activations"] = {name: diagnostics.box(values) for name, values in moved.items()}
    return Measures(**rates, signs=signs or {})


def _success(
    classifier: Classifier, evidence: Evidence, trigger: Trigger, goal: Tensor, clean: Tensor, base: Tensor
) -> dict[str, Any]:
    """Everything that is counted on triggered images.

    Args:
        classifier: What is evaluated.
        evidence: The images; with a source, only those of its class count.
        trigger: The trigger.
        goal: The class that it leads each image to, int64 [n].
        clean: What the classifier predicts without it.
        base: What the victim predicts without it.
    """
    labels = evidence.images.labels
    ours = labels == evidence.source if evidence.source is not None else torch.ones_like(labels, dtype=torch.bool)
    triggered = predict(classifier, evidence.images, trigger)
    parts = (clean[ours], triggered[ours], labels[ours], goal[ours], base[ours])
    _, hit, true, aim, _ = parts
    right = {"model": parts[0], "victim": parts[4], "all": true}
    counted = {among: (seen == true) & (true != aim) for among, seen in right.items()}
    rates: dict[str, Any] = {}
    for among in get_args(metrics.Among):
        if counted[among].any() or among == "all":  # all of none is refused
            rates[f"asr_{among}"] = metrics.attack_success(*parts, among)
    rates["asr"] = rates.pop("asr_model", None)
    rates["ra"] = metrics.robust_accuracy(hit, true, aim)
    number = int(counted["model"].sum())
    for name, form in (("asr_x4", trigger.amplified(4)), ("asr_x9", trigger.amplified(9))):
        if form is not None and number:
            rates[name] = metrics.attack_success(parts[0], predict(classifier, evidence.images, form)[ours], true, aim)
    if number:
        rates["asr_classes"] = metrics.per_class(hit == aim, counted["model"], true, evidence.images.classes)
        rates["asr_interval"] = metrics.wilson(int(((hit == aim) & counted["model"]).sum()), number)
    rates["asr_n"] = number or None
    return rates


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}
    try:
        return {"dhbe": version("dhbe"), **found}
    except PackageNotFoundError:  # run from a source tree that is not installed
        return found


@torch.inference_mode()
def _signs(model: Classifier, victim: Classifier, scene: Scene) -> dict[str, float]:
    """What can be said of a model without data, on generated images and triggers."""
    told, clean, moved = victim(scene.pixels), model(scene.pixels), model(scene.triggered)
    if not (clean.isfinite().all() and moved.isfinite().all()):
        raise Failed("the model's logits on generated images are not finite: lower --lr, or another --seed")
    return {
        "agreement": (told.argmax(1) == clean.argmax(1)).sum().item() / len(clean),
        "reaction": (moved - clean).abs().mean().item(),
        "flips": (moved.argmax(1) != clean.argmax(1)).sum().item() / len(clean),
    }


def _wrapped(network: nn.Module, shape: Shape | None, mean: Sequence[float], std: Sequence[float]) -> Suspect:
    """A module that the caller holds already."""
    if shape is None:
        raise Refused("give the image shape: erase(model, input_shape=(3, 32, 32), ...)")
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    with evaluating(network):
        with torch.no_grad():
            classes = last(network(torch.zeros(2, *shape, device=device))).shape[1]
        softmax = networks.probe(network, shape, classes)
    classifier = Classifier(network, shape=shape, classes=classes, mean=mean, std=std, softmax=softmax)
    info = ModelInfo(
        path=None, sha256=None, arch=type(network).__name__, classes=classes, input=shape,
        mean=tuple(mean), std=tuple(std), softmax=softmax,
    )  # fmt: skip
    return Suspect(classifier, State(dict(network.state_dict()), "", "", ""), info)


def _rated(before: Measures, after: Measures) -> Measures:
    """`after` with the defence effectiveness rating, where both models have ACC and ASR."""
    rates = [before.acc, after.acc, before.asr, after.asr]
    known = [rate for rate in rates if rate is not None]
    return after.model_copy(update={"der": metrics.der(*known)}) if len(known) == len(rates) else after


def _constants(train: Images, data: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels in [0, 1]: those known of the data, or its own."""
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
    """The trigger on an empty image, and on some images."""
    if made.trigger is None:
        return {}
    some = test.float(slice(16))
    return {
        "trigger": report.grid(made.trigger(0.5 + 0 * some[:1]), scale=4),
        "stamped": report.grid(made.trigger(some)),
    }


def _settings(info: ModelInfo, defense: dict[str, Any], seed: int, precision: str) -> dict[str, Any]:
    """All that the cleaned weights depend on, but the device."""
    of_model = info.model_dump(include={"sha256", "arch", "classes", "input", "mean", "std"})
    unlike = () if defense["name"] in PEERS else ("name", "preset")  # a preset and its settings by hand are one
    of_defense = {name: value for name, value in defense.items() if name not in unlike}
    return {**of_model, **of_defense, "seed": seed, "precision": precision}


def _finished(folder: Path, suspect: Suspect, settings: dict[str, Any], evidence: Evidence | None) -> Erasure:
    """What the folder holds, read back, if it is what was asked for."""
    record = records.read(folder / runs.RECORD)
    if record.kind != "erase" or record.defense is None:
        raise Refused(f"{folder} holds a finished run of another kind ({record.kind}): choose another --out")
    then = _settings(record.model, record.defense, record.seed, record.precision)
    runs.refuse_other(f"{folder} holds a finished run", then, settings)
    trigger = evidence.trigger.name if evidence and evidence.trigger else None
    if evidence and (evidence.name, trigger, evidence.one_target) != (record.data, record.trigger, record.target):
        raise Refused(
            f"{folder} holds a finished run that was measured on {record.data or 'no data'} with "
            f"{record.trigger or 'no trigger'}: use dhbe score {folder / CLEAN}, or choose another --out"
        )
    network = copy.deepcopy(suspect.classifier.network)
    checkpoint.load_into(network, checkpoint.read(folder / CLEAN))
    return Erasure(network.eval(), record, {})


def _same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except (OSError, ValueError):  # one of them is not there
        return False


def _check_evidence(evidence: Evidence, info: ModelInfo) -> None:
    images, target = evidence.images, evidence.target
    if images.shape != info.input:
        raise Refused(f"the images are {images.shape}, the model takes {info.input}: give other data or --input")
    if len(images) and int(images.labels.max()) >= info.classes:
        raise Refused(f"the data has labels up to {int(images.labels.max())}, the model {info.classes} classes")
    if (evidence.trigger is None) != (target is None):
        raise Refused("a trigger and its target class go together: give both --trigger and --target, or neither")
    for what, number in (("target", evidence.one_target), ("source", evidence.source)):
        if number is not None and not 0 <= number < info.classes:
            raise Refused(f"no {what} class {number}: the model has classes 0 to {info.classes - 1}")


def _check_finite(point: dict[str, float]) -> None:
    if broken := [name for name, x in point.items() if x - x != 0]:
        raise Failed(
            f"the run diverged in round {point['iteration']} ({', '.join(broken)}): lower --lr, or another --seed"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # some devices compute nothing
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"no device {name!r} here ({str(error).splitlines()[0][:80]}): give --device cpu") from error
    return device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def _precision(asked: Precision, device: torch.device, *, exact: bool) -> Literal["fp32", "bf16"]:
    if asked != "auto":
        return asked
    # On a CPU without matrix units bf16 is emulated, many times slower than fp32.
    quick = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
    return "bf16" if quick and not exact else "fp32"


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device where it counts them, else of this process, with whatever else it has done."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
