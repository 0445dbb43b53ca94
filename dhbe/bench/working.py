"""The work on a case. Only processes that compute import this module."""

import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dhbe import api, attacks, data, records, settings, suspects
from dhbe.api import machine
from dhbe.attacks.triggers import parse
from dhbe.bench.cases import Case
from dhbe.bench.store import CaseRecord, Outcome
from dhbe.data import Images
from dhbe.defenses import PEERS, PRESETS, RoundInfo
from dhbe.evaluation import diagnostics
from dhbe.records import Record
from dhbe.run_state import RunState
from dhbe.search.survey import Survey
from dhbe.training import Fit

Handed = Sequence[Mapping[str, bytes]]
"""The files of the needed cases, in order."""

WEIGHTS = (api.BACKDOORED, api.CLEAN)
VICTIM = (*WEIGHTS, api.TRIGGER, "record.json")
LONG = 5.0
"""Estimated minutes above which a run saves its state, so that it can resume if killed."""


def work(case: Case, code: str, needed: Handed, device: str = "auto", folder: Path | None = None) -> Outcome:
    """Runs a case; errors become part of its result.

    Args:
        case: What to do.
        code: Version of the code, for the record.
        needed: What the needed cases handed on.
        device: As on the command line.
        folder: Where a long run may save its state; it is gone when the run is over.
    """
    began = time.monotonic()
    told: dict[str, Any] = {}
    handed: Mapping[str, bytes] = {}
    pictures: Mapping[str, bytes] = {}
    try:
        told, handed, pictures = WORKS[case.work](case, needed, device, folder)
        if folder and folder.exists():
            shutil.rmtree(folder)
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:500]}
    record = CaseRecord(
        id=case.id, code=code, name=case.name, work=case.work, settings=dict(case.settings),
        needs=[need.id for need in case.needs], pictures=sorted(pictures), seconds=time.monotonic() - began,
        device=_device(device), versions=machine.versions(), finished=machine.now(), **told,
    )  # fmt: skip
    return Outcome(record, handed, pictures)


Did = tuple[dict[str, Any], Mapping[str, bytes], Mapping[str, bytes]]
"""Fields of the case's record, files for other cases, pictures."""


def _plant(case: Case, needed: Handed, device: str, folder: Path | None) -> Did:
    told = case.settings
    how = settings.changed(_class(told["attack"], attacks.ALL, told.get("file"))(), told["settings"])
    train, test = images(told["data"], "train", told["images"]), images(told["data"], "test", told["tested"])
    with tempfile.TemporaryDirectory() as place:
        clean = suspects.load(_victim(needed[0], Path(place) / "clean")) if needed else None
        long = folder is not None and case.minutes >= LONG
        out = folder if folder and long else Path(place) / "victim"
        record = api.attack(
            how, train, test, arch=told["arch"], out=out, data=told["data"],
            fit=settings.changed(Fit(epochs=1), told["fit"]), seed=told["seed"], device=device, clean=clean,
            fine_tune=clean is not None, force=True, resume=long,
        )  # fmt: skip
        made = {name: (out / name).read_bytes() for name in VICTIM if (out / name).exists()}
    return {"record": brief(record)}, made, {}


def _erase(case: Case, needed: Handed, device: str, folder: Path | None) -> Did:
    told, name = case.settings, case.settings["defense"]
    with tempfile.TemporaryDirectory() as place:
        suspect, evidence = _loaded(needed[0], Path(place), case.needs[0])
    run: dict[str, Any] = {"seed": told["seed"], "device": device, "evidence": evidence}
    run["precision"] = told.get("precision", "auto")
    if folder and case.minutes >= LONG:
        run |= {"out": folder, "resume": True}
    if name in PRESETS:
        defense = settings.changed(PRESETS[name], told["settings"])
        with _taken_out(told.get("without")):
            record = api.erase(suspect, preset=name, defense=defense, **run).record
    else:
        defense = settings.changed(_class(name, PEERS, told.get("file"))(), told["settings"])
        victim = case.needs[0].settings
        lent = images(victim["data"], "train", victim["images"]) if told.get("lent") else None
        if lent and told["subset"] != told["seed"]:
            lent = data.clean_subset(lent, told["lent"], told["subset"])
        record = api.defend(
            suspect, defense, clean=lent, source=victim["data"], images=told.get("lent", 0), target=evidence.one_target, **run
        ).record  # fmt: skip
    return {"record": brief(record)}, {}, {}


def _scan(case: Case, needed: Handed, device: str, folder: Path | None) -> Did:
    with tempfile.TemporaryDirectory() as place:
        suspect, evidence = _loaded(needed[0], Path(place), case.needs[0])
        planted = records.read(Path(place) / "record.json")
    survey = settings.changed(Survey(), case.settings["settings"])
    record = api.scan(suspect, survey=survey, seed=case.settings["seed"], device=device).record
    told = {"attack": planted.attack, "data": planted.data, "target": evidence.one_target}
    return {"record": brief(record.model_copy(update=told))}, {}, {}


def _move(case: Case, needed: Handed, device: str, folder: Path | None) -> Did:
    """The mean change of images by a trigger (table 1)."""
    shown = images(case.settings["data"], "test", case.settings["tested"])
    trigger = parse(case.settings["trigger"], shown.shape)
    return {"found": {"distance": diagnostics.trigger_distance(trigger, shown.float())}}, {}, {}


def _classes(case: Case, needed: Handed, device: str, folder: Path | None) -> Did:
    """Distances of classes (table 2): the closest pair, and the mean of all pairs."""
    told = case.settings
    shown = images(told["data"], "train", told["images"])
    apart = diagnostics.class_distances(shown, told["directions"], told["draws"])
    closest = min(apart, key=lambda pair: apart[pair])
    names = " and ".join(shown.names[label] for label in closest)
    found = {"closest": apart[closest], "mean": sum(apart.values()) / len(apart), "pair": names}
    return {"found": found}, {}, {}


def _amplify(case: Case, needed: Handed, device: str, folder: Path | None) -> Did:
    """Images with a trigger once, four and nine times (figure 5)."""
    from dhbe import report

    shown = images(case.settings["data"], "test", case.settings["tested"])
    trigger, some = parse(case.settings["trigger"], shown.shape), shown.float(slice(8))
    forms = {"x1": trigger, "x4": trigger.amplified(4), "x9": trigger.amplified(9)}
    drawn = {f"{name}.png": report.grid(form(some), scale=3) for name, form in forms.items() if form}
    return {"found": {name.removesuffix(".png"): 1 for name in drawn}}, {}, drawn


def _imagine(case: Case, needed: Handed, device: str, folder: Path | None) -> Did:
    """Images that a defence uses instead of data: generated or inverted (figure 12)."""
    from dhbe import report

    told, name = case.settings, case.settings["defense"]
    with tempfile.TemporaryDirectory() as place:
        suspect, _ = _loaded(needed[0], Path(place), case.needs[0])
    victim, last = suspect.classifier.to(machine.device(device)), list[RoundInfo]()
    kinds = settings.changed(PRESETS[name] if name in PRESETS else PEERS[name](), told["settings"])
    state = RunState()
    kinds(victim, seed=told["seed"], run_state=state, watch=lambda info: last.append(info) if not last else None)
    if name in PRESETS:
        pixels = kinds.samples(victim, state, 32, told["seed"]).pixels  # pyright: ignore[reportAttributeAccessIssue]
    else:
        pixels = torch.cat(list(state.part("inverted")))[:32]
    return {}, {}, {f"{name}.png": report.grid(pixels.detach().clamp(0, 1).cpu(), scale=2)}


def _call(case: Case, needed: Handed, device: str, folder: Path | None) -> Did:
    """Calls a user's function."""
    made = getattr(user_code(case.settings["file"]), case.settings["function"])(**case.settings["settings"])
    return ({"record": brief(made)} if isinstance(made, Record) else {"found": made}), {}, {}


WORKS: dict[str, Callable[[Case, Handed, str, Path | None], Did]] = {
    "plant": _plant, "erase": _erase, "scan": _scan, "move": _move, "classes": _classes, "amplify": _amplify,
    "imagine": _imagine, "call": _call,
}  # fmt: skip


def images(name: str, split: data.Split, count: int | None) -> Images:
    """A part of a data set, or its first images; training images are balanced by class."""
    found = _part(name, split)
    if count is None or count >= len(found):
        return found
    return data.clean_subset(found, count) if split == "train" else found.subset(slice(count))


@cache
def _part(name: str, split: data.Split) -> Images:
    return data.load(name, split)


def _victim(files: Mapping[str, bytes], folder: Path) -> Path:
    """Writes a victim's files into a folder; returns the path of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return next(folder / name for name in WEIGHTS if name in files)


def _loaded(files: Mapping[str, bytes], folder: Path, victim: Case) -> tuple[suspects.Suspect, api.Evidence]:
    """A victim and its evidence."""
    weights, told = _victim(files, folder), victim.settings
    planted, trigger = records.read(folder / "record.json"), folder / api.TRIGGER
    model = planted.model
    suspect = suspects.load(
        weights, arch=told["arch"], classes=model.classes, input_shape=model.input, mean=model.mean, std=model.std
    )
    test = images(told["data"], "test", told["tested"])
    shown = parse(str(trigger), suspect.info.input) if trigger.exists() else None
    evidence = api.Evidence(test, told["data"], shown, planted.target)
    info = suspect.info.model_copy(update={"path": f"{victim.stem}.safetensors"})
    return replace(suspect, info=info), evidence


def _class(name: str, known: Mapping[str, type], file: str | None) -> type:
    """An attack or defence by name, or the class of that name in the user's file."""
    return getattr(user_code(file), name) if file else known[name]


@cache
def user_code(file: str) -> Any:
    """Executes a user's file and returns its module."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    if "" not in sys.path:  # as for a script, what lies beside it in the folder at hand can be imported
        sys.path.insert(0, "")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _taken_out(part: str | None) -> Any:
    from dhbe.bench import parts

    return parts.taken_out(part)


def brief(record: Record) -> Record:
    """A record without its curve, which is most of its size."""
    return record.model_copy(update={"curve": []})


def _device(name: str) -> str:
    try:
        return machine.device_name(machine.device(name))
    except ValueError:
        return name
