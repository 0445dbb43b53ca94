"""Backdoored classifiers to practise on."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from dhbe import files, networks, records, report, runs, suspects
from dhbe.api import machine
from dhbe.attacks import Attack, Backdoor, Workshop
from dhbe.checkpoint import State
from dhbe.classifier import Classifier
from dhbe.data import KNOWN, Images
from dhbe.errors import Failed, Refused
from dhbe.evaluation import measuring
from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.measuring import measured
from dhbe.records import Measures, ModelInfo, Record
from dhbe.suspects import Suspect
from dhbe.training import Fit

BACKDOORED = "backdoored.safetensors"
TRIGGER = "trigger.json"


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
    inputs: Sequence[Path] = (),
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
        overwrite: Begin anew over what `out` holds, which stays until the new results are complete.
        inputs: Files beside the clean model's that the attack was made from; none is ever replaced.
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
        measuring.check(Evidence(test), clean.info)
        if clean.info.arch != arch or clean.info.classes != train.classes:
            raise Refused(
                f"the clean model is a {clean.info.arch} of {clean.info.classes} classes, "
                f"the attack makes a {arch} of {train.classes}: they must agree"
            )
    where = machine.device(device)
    settings = {
        "attack": how.name, **asdict(how), "arch": arch, "data": data, "fit": asdict(fit), "seed": seed,
        "clean": clean.info.sha256 if clean else None, "fine_tune": fine_tune,
    }  # fmt: skip
    mean, std = (clean.info.mean, clean.info.std) if clean else _constants(train, data)
    contiguous = arch not in networks.ZOO and not networks.takes_channels_last(
        networks.build(arch, train.classes, train.shape), train.shape
    )
    read = [*(clean.files if clean else ()), *inputs]
    with (
        runs.opened(out, settings, inputs=read, results=[BACKDOORED, TRIGGER], overwrite=overwrite) as run,
        torch.random.fork_rng(),
    ):
        torch.manual_seed(seed)
        epochs, start = 0, copy.deepcopy(clean.classifier).to(where) if clean else None

        def fresh() -> Classifier:
            if start and fine_tune:
                return copy.deepcopy(start)
            network = networks.build(arch, train.classes, train.shape)
            return Classifier(
                network, shape=train.shape, classes=train.classes, mean=mean, std=std, contiguous=contiguous
            ).to(where)

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
            path=BACKDOORED,
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
            suspects.save(folder / BACKDOORED, network, State(dict(network.state_dict()), "", "", ""), info)
            if made.trigger:
                files.write(folder / TRIGGER, made.trigger.to_json())
            record = Record(
                kind="attack", model=info.model_copy(update={"sha256": files.sha256(folder / BACKDOORED)}),
                attack={"name": how.name, **asdict(how), "poisoned": len(made.chosen), "fit": asdict(fit),
                        "clean": settings["clean"], "fine_tune": fine_tune}, data=data,
                trigger=made.trigger.name if made.trigger else None, target=evidence.one_target, before=after,
                seconds=time.monotonic() - began, iterations=epochs, device=machine.device_name(where),
                precision="fp32", versions=machine.versions(), seed=seed,
                warnings=[*train.notes, *([str(missed)] if missed else [])], finished=machine.now(),
            )  # fmt: skip
            files.write(folder / runs.REPORT, report.render(record, _shown(made, test)))
            records.write(folder / runs.RECORD, record)
    return record


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
