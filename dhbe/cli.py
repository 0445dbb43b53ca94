"""The command line. Each verb is one call of `dhbe.api`; torch is loaded only once a verb needs it."""

import argparse
import ast
import inspect
import json
import os
import sys
import time
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dhbe.errors import Failed, Interrupted, Refused
from dhbe.progress import Progress

if TYPE_CHECKING:
    from dhbe.api import Evidence
    from dhbe.attacks import Target
    from dhbe.data import Shape
    from dhbe.records import Measures, Record
    from dhbe.suspects import Suspect

DONE, GATE, USAGE, FAILED, INTERRUPTED = 0, 1, 2, 4, 130
"""Exit codes: done; done but a gate failed; refused input; failed run; interrupted with the state saved."""

VERBS = {
    "erase": "give back a classifier of the same form without its backdoor; no data needed",
    "score": "measure ACC and ASR of a model on data",
    "attack": "train a backdoored classifier to practise on",
    "defend": "run one of the defences of others, to compare or to use clean images",
    "demo": "plant a backdoor in a small network on handwritten digits, and erase it",
    "doctor": "tell what this machine offers, and whether the installation works",
}

TRIGGER_HELP = "as badnets:3 (dhbe attack --help lists them), an .npz with pattern and mask, or a file that dhbe wrote"
DATA_HELP = (
    "digits, digits16, cifar10, cifar100, another data set in $DHBE_DATA, an image folder (one sub-folder a class), "
    "or an .npz"
)
ARCH_HELP = "name of the zoo, torchvision:NAME, timm:NAME, file.py:function or package.module:function (runs that code)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, verb: str = "", examples: str = "", **more: Any) -> None:
        super().__init__(
            prog=f"dhbe {verb}".strip(),
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )

    def error(self, message: str) -> typing.NoReturn:
        raise Refused(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    try:
        code = _obey(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except Refused as error:
        return _said(error, USAGE)
    except Failed as error:
        return _said(error, FAILED)
    except Interrupted as error:
        return _said(error, INTERRUPTED)
    except KeyboardInterrupt:
        return _said("interrupted", INTERRUPTED)
    except OSError as error:  # mostly of our output: its reader has gone, or its disk is full
        _give_up_output()
        if isinstance(error, BrokenPipeError):
            return DONE
        place = f"{error.filename}: " if error.filename else ""
        return _said(f"{place}{(error.strerror or type(error).__name__).lower()}", FAILED)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _said("out of memory: lower --batch", FAILED)


def _obey(arguments: list[str]) -> int:
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help"):
        print(_overview())
        return DONE
    if verb == "--version":
        from importlib.metadata import version

        print(f"dhbe {version('dhbe')}")
        return DONE
    if verb not in VERBS:
        raise Refused(f"no verb {verb!r}; there are {', '.join(VERBS)} (see dhbe --help)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' remarks are not for the user of a command
        try:
            return globals()[verb](rest)
        except SystemExit:  # argparse has shown its help
            return DONE


def _out_of_memory(error: BaseException) -> bool:
    said = ("out of memory", "can't allocate memory", "not enough memory", "size calculation overflowed")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def _give_up_output() -> None:
    """Lets nothing complain any more, when Python ends, about what cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _said(error: object, code: int) -> int:
    print(f"dhbe: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _overview() -> str:
    lines = [f"  {name:8} {what}" for name, what in VERBS.items()]
    return "\n".join(
        [
            "usage: dhbe VERB ... (dhbe VERB --help tells more)",
            "",
            "Erase backdoors from image classifiers when there is no data.",
            "",
            *lines,
            "",
            "examples:",
            "  dhbe demo",
            "  dhbe erase vendor.pt --arch resnet18 --classes 10 --mean .491 .482 .447 --std .247 .243 .262",
            "  dhbe score clean.safetensors --data test.npz --trigger badnets:3 --target 9",
            "",
            "exit codes: 0 done; 1 a gate failed; 2 wrong usage or refused input; 4 failed; 130 interrupted, state saved",
        ]
    )


# The verbs


def erase(argv: Sequence[str]) -> int:
    """`dhbe erase MODEL`."""
    from dhbe import api
    from dhbe.defenses import PRESETS

    parser = Parser(
        "erase",
        "  dhbe erase vendor.pt --arch resnet18 --classes 10 --mean .491 .482 .447 --std .247 .243 .262\n"
        "  dhbe erase vendor.pth --arch vendor/model.py:build --classes 10 --input 3x32x32 --out cleaned\n"
        "  dhbe erase suspect.safetensors --data test.npz --trigger badnets:3 --target 9 --max-asr .05",
        description="Gives back a classifier of the same form that no longer answers to a hidden trigger. No data needed.",
    )
    _add_model(parser)
    early = Parser(add_help=False)  # the preset says which settings there are
    for each in (early, parser):
        each.add_argument("--preset", default="fast", choices=list(PRESETS), help="fast: ours; paper, official: exact")
    _add_run(parser)
    _add_evidence(parser, needed=False)
    _add_gates(parser)
    _add_output(parser)
    preset, _ = early.parse_known_args(argv)
    _add_fields(parser, type(PRESETS[preset.preset]), f"settings of {preset.preset}", PRESETS[preset.preset])
    args = parser.parse_args(argv)
    suspect = _suspect(args)
    evidence = _evidence(args, suspect)
    _check_gates(args, evidence)
    out = args.out or Path("runs") / args.model.stem
    for line in suspect.warnings:
        _tell(args, f"note: {line}")
    defense = _changed(PRESETS[args.preset], args)
    running = _running(suspect.info.code)
    with Progress(defense.rounds, f"erasing {args.model.name}", args.quiet, folder=out) as progress, running:
        result = api.erase(
            suspect, preset=args.preset, defense=defense, seed=args.seed, device=args.device, precision=args.precision,
            evidence=evidence, out=out, resume=args.resume, overwrite=args.overwrite,
            checkpoint_every=args.checkpoint_every, watch=progress.glimpse,
        )  # fmt: skip
    record = result.record
    _show(args, record.model_dump(mode="json", exclude={"curve"}), lambda: _erased(record, out))
    return _passed(args, record)


def defend(argv: Sequence[str]) -> int:
    """`dhbe defend NAME MODEL`."""
    from dhbe import api
    from dhbe.data import load, part_to_measure
    from dhbe.defenses import PEERS

    names = "\n".join(
        f"  {name:16} needs {' and '.join(sorted(kind.needs)) or 'nothing'}" for name, kind in PEERS.items()
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: dhbe defend NAME MODEL --data DATA (dhbe defend NAME --help tells more)\n\n{names}\n\n"
            "examples:\n  dhbe defend clp vendor.pt --arch resnet18 --classes 10\n"
            "  dhbe defend nad suspect.safetensors --data cifar10 --trigger badnets:3 --target 9 --out cleaned"
        )
        return DONE
    if argv[0] not in PEERS:
        raise Refused(f"no defence {argv[0]!r}; there are {', '.join(PEERS)} (see dhbe defend --help)")
    kind = PEERS[argv[0]]
    parser = Parser(
        f"defend {kind.name}",
        f"  dhbe defend {kind.name} vendor.pt --arch resnet18 --data cifar10\n"
        f"  dhbe defend {kind.name} suspect.safetensors --data cifar10 --trigger badnets:3 --target 9 --out cleaned",
        description=f"Needs {' and '.join(sorted(kind.needs)) or 'nothing'} beside the model.",
    )
    _add_model(parser)
    _add_run(parser)
    group = parser.add_argument_group("data (the test part measures, and no defence sees it)")
    group.add_argument("--data", help=f"{DATA_HELP}; its training part is lent to a defence that needs images")
    group.add_argument("--clean", metavar="DATA", help="lend these images instead; all of --data may measure then")
    group.add_argument("--images", type=_whole, default=2000, metavar="N", help="how many are lent (default: 2000)")
    group.add_argument("--trigger", help=TRIGGER_HELP)
    group.add_argument("--target", type=_target, metavar="T", help="class that the trigger leads to, or next")
    group.add_argument("--source", type=int, metavar="S", help="the only class whose images the trigger is for")
    _add_gates(parser)
    _add_output(parser)
    _add_fields(parser, kind, f"settings of {kind.name}", kind())
    args = parser.parse_args(argv[1:])
    suspect, defense, clean = _suspect(args), _changed(kind(), args), None
    if args.clean == args.data:  # what is lent does not measure
        args.clean = None
    args.split, target = "auto" if args.clean else "test", args.target
    if target == "next" and "target class" in kind.needs:
        raise Refused(f"{kind.name} needs one target class, not all of them: give --target NUMBER")
    if args.trigger is None:
        args.target = None  # then it is what the defender knows, and nothing is measured with it
    if "clean images" in kind.needs:
        source = args.clean or args.data
        if source is None:
            raise Refused(f"{kind.name} needs clean images: give --data, or --clean")
        whole = args.clean and part_to_measure(source) == "all"
        clean = load(source, "all" if whole else "train", suspect.info.input)
    evidence = _evidence(args, suspect)
    _check_gates(args, evidence)
    out = args.out or Path("runs") / f"{args.model.stem}-{kind.name}"
    for line in suspect.warnings:
        _tell(args, f"note: {line}")
    running = _running(suspect.info.code)
    with Progress(defense.rounds, f"{kind.name} on {args.model.name}", args.quiet, folder=out) as progress, running:
        result = api.defend(
            suspect, defense, clean=clean, source=args.clean or args.data or "", images=args.images,
            target=None if target == "next" else target,
            seed=args.seed, device=args.device, precision=args.precision, evidence=evidence, out=out,
            resume=args.resume, overwrite=args.overwrite, checkpoint_every=args.checkpoint_every,
            watch=progress.glimpse,
        )  # fmt: skip
    record = result.record
    _show(args, record.model_dump(mode="json", exclude={"curve"}), lambda: _erased(record, out))
    return _passed(args, record)


def score(argv: Sequence[str]) -> int:
    """`dhbe score MODEL`."""
    from dhbe import api

    parser = Parser(
        "score",
        "  dhbe score suspect.safetensors --data digits --trigger badnets:3 --target 9\n"
        "  dhbe score vendor.pt --arch vendor.py:net --classes 10 --data test.npz --trigger trigger.npz --target 0 --json",
        description="Measures accuracy (ACC) and, with a trigger, attack success rates (ASR) of a model on data.",
    )
    _add_model(parser)
    _add_evidence(parser, needed=True)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    _add_output(parser)
    args = parser.parse_args(argv)
    suspect = _suspect(args)
    for line in suspect.warnings:
        _tell(args, f"note: {line}")
    evidence = _evidence(args, suspect)
    assert evidence is not None
    with _running(suspect.info.code):
        measures = api.score(suspect, evidence, device=args.device)
    _show(args, measures.model_dump(mode="json", exclude={"signs"}), lambda: _rates({"measured": measures}))
    return DONE


def attack(argv: Sequence[str]) -> int:
    """`dhbe attack NAME`."""
    from dhbe import api
    from dhbe.attacks import ALL
    from dhbe.data import load
    from dhbe.suspects import load as load_suspect
    from dhbe.suspects import vendor_code
    from dhbe.training import Fit

    if not argv or argv[0] in ("-h", "--help"):
        print(_attacks())
        return DONE
    if argv[0] not in ALL:
        raise Refused(f"no attack {argv[0]!r}; there are {', '.join(ALL)} (see dhbe attack --help)")
    kind = ALL[argv[0]]
    parser = Parser(
        f"attack {argv[0]}",
        f"  dhbe attack {argv[0]} --data digits --arch resnet8 --out practice --no-flip\n"
        f"  dhbe attack {argv[0]} --data cifar10 --arch resnet18 --out victim --epochs 200 --schedule steps",
        description=f"{kind.summary[0].upper()}{kind.summary[1:]}. Trains a classifier with this backdoor.",
    )
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--arch", required=True, help=ARCH_HELP)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for model, trigger and record")
    parser.add_argument("--input", type=_shape, metavar="CxHxW", help="size that image files are converted to")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of everything random (default: 0)")
    parser.add_argument(
        "--clean",
        type=Path,
        metavar="MODEL",
        help="a clean model: ACC is compared with its own, and trojaning starts there",
    )
    parser.add_argument(
        "--fine-tune",
        action="store_true",
        help="start from the weights of --clean, not from scratch: fewer epochs suffice",
    )
    parser.add_argument("--force", action="store_true", help="keep the model even if the attack missed, marked as such")
    parser.add_argument("--overwrite", action="store_true", help="begin anew over what --out holds")
    _add_output(parser)
    _add_fields(parser, kind, "settings of the attack", kind())
    _add_fields(parser, Fit, "settings of the training", Fit(epochs=30))
    args = parser.parse_args(argv[1:])
    train, test = (load(args.data, part, args.input) for part in ("train", "test"))
    how, fit = _changed(kind(), args), _changed(Fit(epochs=30), args)
    clean = load_suspect(args.clean, shape=train.shape) if args.clean else None
    running = _running(vendor_code(args.arch))
    epochs = how.epochs(fit, clean=clean is not None)
    with Progress(epochs, f"training {args.arch} with {kind.name}", args.quiet) as progress, running:
        record = api.attack(
            how, train, test, arch=args.arch, out=args.out, data=args.data, fit=fit, seed=args.seed, device=args.device,
            clean=clean, fine_tune=args.fine_tune, force=args.force, overwrite=args.overwrite, watch=progress.epoch,
        )  # fmt: skip
    before = record.before
    assert before is not None
    for line in record.warnings:
        _tell(args, f"note: {line}")
    _show(
        args, record.model_dump(mode="json"),
        lambda: _rates({"made": before}) + f"\n{args.out / api.BACKDOORED}",
    )  # fmt: skip
    return DONE


def demo(argv: Sequence[str]) -> int:
    """`dhbe demo`."""
    from dhbe import api
    from dhbe.attacks import BadNets
    from dhbe.data import load
    from dhbe.defenses import PRESETS
    from dhbe.suspects import load as load_suspect
    from dhbe.training import Fit

    parser = Parser(
        "demo",
        "  dhbe demo\n  dhbe demo --out here --seed 1",
        description="Plants a backdoor in a small network on handwritten digits, then erases it without data.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    _add_machine(parser)
    _add_output(parser)
    args = parser.parse_args(argv)
    train, test = load("digits", "train"), load("digits", "test")
    how = BadNets(side=3, rate=0.1)
    fit = Fit(epochs=8, batch=32, crop=0, flip=False)  # a mirrored digit is no digit
    victim = args.out / "victim"
    _tell(
        args, f"1/2 planting a backdoor: {len(train)} images of digits, {how.rate:.0%} with a 3 x 3 checkerboard -> 9"
    )
    with Progress(fit.epochs, "training a backdoored ResNet-8", args.quiet) as progress:
        api.attack(
            how, train, test, arch="resnet8", out=victim, data="digits", fit=fit, seed=args.seed, device=args.device,
            overwrite=True, watch=progress.epoch,
        )  # fmt: skip
    suspect = load_suspect(victim / api.BACKDOORED)
    evidence = api.Evidence(test, "digits", how.trigger_for(test.shape), how.target_in(test.classes))
    defense = PRESETS["fast"]
    _tell(args, "2/2 erasing it: from here on no image and no trigger is used, except to measure")
    with Progress(defense.rounds, "erasing", args.quiet, folder=args.out) as progress:
        result = api.erase(
            suspect, defense=defense, seed=args.seed, device=args.device, precision=args.precision, evidence=evidence,
            out=args.out, overwrite=True, watch=progress.glimpse,
        )  # fmt: skip
    record = result.record
    _show(args, record.model_dump(mode="json", exclude={"curve"}), lambda: _erased(record, args.out))
    return DONE


def doctor(argv: Sequence[str]) -> int:
    """`dhbe doctor`."""
    parser = Parser(
        "doctor", "  dhbe doctor", description="Tells what this machine offers, and whether dhbe works on it."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    import importlib.util

    import torch

    from dhbe import api, networks
    from dhbe.classifier import Classifier
    from dhbe.defenses import FastDHBE

    found: dict[str, Any] = dict(api.versions())
    found["threads"] = torch.get_num_threads()
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found["bf16"] = "yes" if api._precision("auto", api._device("auto"), exact=False) == "bf16" else "no (slow here)"
    for extra in ("torchvision", "timm", "tensorboard"):
        found[extra] = "yes" if importlib.util.find_spec(extra) else "no"
    network = networks.build("resnet8", 10, (3, 16, 16))
    began = time.monotonic()
    trial = FastDHBE(iterations=1, warm_up=1, batch=16)
    trial(Classifier(network, shape=(3, 16, 16), classes=10))
    found["trial run"] = f"works, {time.monotonic() - began:.1f} s"
    old = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 13)
    if old:
        found["advice"] = (
            "torch is older than 2.13; its restricted loader has known weaknesses: update before opening strangers' files"
        )
    print(json.dumps(found) if args.json else "\n".join(f"{name:12} {what}" for name, what in found.items()))
    return DONE


# Arguments


def _add_model(parser: Parser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help=".safetensors, or .pt/.pth/.th/.tar that holds tensors"
    )
    parser.add_argument("--arch", help=ARCH_HELP + "; default: as the tensors tell")
    parser.add_argument("--classes", type=_whole, metavar="N", help="number of classes; default: as the tensors tell")
    parser.add_argument("--input", type=_shape, metavar="CxHxW", help="shape of the images (default: 3x32x32)")
    for name, neutral in (("mean", 0), ("std", 1)):
        parser.add_argument(
            f"--{name}", type=_constants(name), nargs="+", metavar="X",
            help=f"{name} that inputs are normalised with, pixels in 0..1: one number, one a channel, or the name of a "
            f"data set, as cifar10 (default: {neutral})",
        )  # fmt: skip


def _add_machine(parser: Parser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="default: auto")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of everything random (default: 0)")


def _add_run(parser: Parser) -> None:
    """Where a defence runs and what becomes of it."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: one below runs)")
    _add_machine(parser)
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    earlier.add_argument("--overwrite", action="store_true", help="begin anew over an earlier run in --out")
    parser.add_argument(
        "--checkpoint-every",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds between two checkpoints (default: 30)",
    )


def _add_gates(parser: Parser) -> None:
    for name, which in (("--max-asr", "ASR is above"), ("--min-acc", "ACC is below")):
        parser.add_argument(name, type=_fraction, metavar="F", help=f"exit 1 if the cleaned model's {which} (0..1)")


def _check_gates(args: argparse.Namespace, evidence: "Evidence | None") -> None:
    if args.max_asr is not None and (evidence is None or evidence.trigger is None):
        raise Refused("--max-asr needs --data, --trigger and --target")
    if args.min_acc is not None and evidence is None:
        raise Refused("--min-acc needs --data")


def _passed(args: argparse.Namespace, record: "Record") -> int:
    """The exit code that the gates leave."""
    after = record.after
    assert after is not None
    if args.max_asr is not None and after.asr is None:
        return _said("gate failed: no ASR, because the cleaned model gets no image right", GATE)
    if args.max_asr is not None and after.asr > args.max_asr:
        return _said(f"gate failed: ASR {after.asr:.4f} is above --max-asr {args.max_asr:g}", GATE)
    if args.min_acc is not None and (after.acc is None or after.acc < args.min_acc):
        return _said(f"gate failed: ACC {after.acc:.4f} is below --min-acc {args.min_acc:g}", GATE)
    return DONE


def _add_evidence(parser: Parser, *, needed: bool) -> None:
    group = parser.add_argument_group("measuring" + ("" if needed else " (the method itself never sees these)"))
    group.add_argument("--data", required=needed, help=DATA_HELP)
    group.add_argument(
        "--split",
        choices=["auto", "train", "test", "all"],
        default="auto",
        help="part of the data (default: test where the data has one)",
    )
    group.add_argument("--trigger", help=TRIGGER_HELP)
    group.add_argument(
        "--target", type=_target, metavar="T", help="class that the trigger leads to; next: each image's own plus one"
    )
    group.add_argument("--source", type=int, metavar="S", help="the only class whose images the trigger is for")


def _add_output(parser: Parser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, everything else on stderr")


def _add_fields(parser: Parser, kind: type, title: str, default: Any = None) -> None:
    """An option for each hyperparameter of a frozen dataclass; its help is the field's annotation or docstring."""
    group = parser.add_argument_group(title)
    hints, docs = typing.get_type_hints(kind, include_extras=True), _docs(kind)
    for field in fields(kind):
        hint = hints[field.name]
        kind_of, note = (hint.__origin__, hint.__metadata__[0]) if hasattr(hint, "__metadata__") else (hint, "")
        note = note or docs.get(field.name, "")
        more: dict[str, Any] = {"type": {int: _count, float: _number}.get(kind_of, kind_of)}
        if kind_of is bool:
            more = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind_of) is typing.Literal:
            more = {"choices": typing.get_args(kind_of)}
        shown = f"{note} (default: {getattr(default, field.name)})" if default is not None else note
        group.add_argument(
            f"--{field.name.replace('_', '-')}", default=None, help=shown.strip().replace("%", "%%"), **more
        )


def _docs(kind: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    for each in kind.__mro__:
        if not is_dataclass(each):
            continue
        (tree,) = ast.parse(inspect.getsource(each)).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in pairwise(tree.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found.setdefault(ast.unparse(field.target), " ".join(str(below.value.value).split()))
    return found


def _changed(settings: Any, args: argparse.Namespace) -> Any:
    given = {field.name: getattr(args, field.name) for field in fields(settings)}
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def _between(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], Any]:
    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number") from None
        if not least <= value <= most:  # NaN too
            raise argparse.ArgumentTypeError(f"{text} is not between {least:,} and {most:,}")
        return value

    return read


_whole = _between(int, 2, 100_000)
_seed = _between(int, 0, 2**63 - 1)
_fraction = _between(float, 0, 1)
_seconds = _between(float, 0, 10**9)
_count = _between(int, -(2**40), 2**40)
_number = _between(float, -1e38, 1e38)
_unit = _between(float, -1e6, 1e6)


def _numbers(text: str) -> list[float]:
    return [_unit(part) for part in text.replace(",", " ").split()]


def _constants(name: str) -> Callable[[str], Any]:
    """Reads numbers, or the name of a data set whose mean or standard deviation is known."""

    def read(text: str) -> list[float]:
        if not text[:1].isalpha():
            return _numbers(text)
        from dhbe.data import KNOWN  # not above: it brings torch along

        values = getattr(KNOWN.get(text), name, None)
        return list(values) if values else _numbers(text)  # which refuses

    return read


def _target(text: str) -> "Target":
    return "next" if text == "next" else int(text)


def _shape(text: str) -> "Shape":
    sides = text.lower().split("x")
    if len(sides) != 3 or not all(side.isdecimal() and 1 <= int(side) <= 1024 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape CHANNELSxHEIGHTxWIDTH up to 1024, such as 3x32x32")
    channels, height, width = map(int, sides)
    return channels, height, width


def _suspect(args: argparse.Namespace) -> "Suspect":
    from dhbe.suspects import load

    mean, std = ([x for part in given for x in part] if given else None for given in (args.mean, args.std))
    return load(args.model, arch=args.arch, classes=args.classes, shape=args.input, mean=mean, std=std)


def _evidence(args: argparse.Namespace, suspect: "Suspect") -> "Evidence | None":
    from dhbe.api import Evidence
    from dhbe.attacks.triggers import parse
    from dhbe.data import load, part_to_measure

    if args.data is None:
        if args.trigger or args.target is not None:
            raise Refused("--trigger and --target need --data to be measured on")
        return None
    if args.source is not None and args.trigger is None:
        raise Refused("--source needs --trigger and --target")
    if (args.trigger is None) != (args.target is None):
        raise Refused("give both --trigger and --target, or neither")
    split = part_to_measure(args.data) if args.split == "auto" else args.split
    images = load(args.data, split, suspect.info.input)
    trigger = parse(args.trigger, suspect.info.input) if args.trigger else None
    return Evidence(images, args.data, trigger, args.target, args.source)


@contextmanager
def _running(code: str | None) -> Iterator[None]:
    """While networks run: what the vendor's `code` prints goes to stderr, what it raises becomes one line."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Refused, Failed, Interrupted):
        raise
    except (Exception, SystemExit) as error:
        if code is None or _out_of_memory(error):
            raise
        raise Failed(f"the vendor's code {code} raised {type(error).__name__}: {error}") from error


# What is shown


def _tell(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        print(line, file=sys.stderr, flush=True)


def _show(args: argparse.Namespace, content: dict[str, Any], text: Callable[[], str]) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # names of files need not fit into it
    shown = json.dumps(content) if args.json else text()
    print(shown.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _attacks() -> str:
    """All attacks and all triggers, one line each."""
    from dhbe.attacks import ALL
    from dhbe.attacks.triggers import MAKERS, summary, usage

    made = [(usage(name), summary(name)) for name in MAKERS]
    width = max(len(text) for text, _ in made)
    return "\n".join(
        [
            "usage: dhbe attack NAME --data DATA --arch ARCH --out DIR (dhbe attack NAME --help tells more)",
            "",
            "attacks:",
            *(f"  {name:11} {kind.summary}" for name, kind in ALL.items()),
            "",
            "triggers, for --trigger of other verbs:",
            *(f"  {text:{width}}  {what}" for text, what in made),
            "  each with :opacity=SHARE :scale=FACTOR :at=PLACE :copies=4 or 9 behind it; or as an .npz or .json file",
        ]
    )


def _rates(columns: "dict[str, Measures]") -> str:
    rows = (("ACC", "acc"), ("ASR", "asr"), ("ASR x4", "asr_x4"), ("ASR x9", "asr_x9"))
    rows += (("ASR (victim right)", "asr_victim"), ("ASR (all)", "asr_all"), ("RA", "ra"), ("DER", "der"))
    lines = [f"{'':20}" + "".join(f"{head:>12}" for head in columns)]
    for name, field in rows:
        values = [getattr(measures, field) for measures in columns.values()]
        if any(value is not None for value in values):
            lines.append(f"{name:20}" + "".join(f"{'-' if v is None else f'{v:.2%}':>12}" for v in values))
    return "\n".join(lines)


def _erased(record: "Record", out: Path) -> str:
    before, after = record.before, record.after
    assert before is not None
    assert after is not None
    lines: Iterable[str] = [
        f"{name:20}" + "".join(f"{state.signs[name]:>12.3f}" for state in (before, after) if name in state.signs)
        for name in {**before.signs, **after.signs}
    ]
    head = _rates({"suspect": before, "cleaned": after})
    return "\n".join([head, *lines, f"{record.iterations} rounds, {record.seconds:.0f} s; see {out / 'report.html'}"])


if __name__ == "__main__":
    sys.exit(main())
