"""Groups of options shared by several verbs, and the objects made from them."""

import argparse
import os
import sys
from pathlib import Path

from dhbe import suspects
from dhbe.api import Evidence, Options, Searching, costing
from dhbe.attacks.triggers import parse
from dhbe.cli import shown, values, vendor
from dhbe.cli.parser import Parser
from dhbe.data import Images, Split, class_names, load, part_to_measure
from dhbe.defenses import Defense
from dhbe.errors import Refused
from dhbe.progress import Progress
from dhbe.search.survey import Survey
from dhbe.suspects import Suspect

TRIGGER_HELP = (
    "such as badnets:3 (dhbe attack --help lists them), an .npz with pattern and mask, or a file written by dhbe"
)
DATA_HELP = (
    "digits, digits16, cifar10, cifar100, another data set in $DHBE_DATA, an image folder (one sub-folder per class), "
    "or an .npz"
)
ARCH_HELP = "a built-in name, torchvision:NAME, timm:NAME, file.py:function or package.module:function (runs that code)"


def add_model(parser: Parser) -> None:
    """Adds the model, its architecture and its input format."""
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help=".safetensors, .pt/.pth/.ckpt/... with tensors, a Hugging Face folder, .onnx, or .npz (docs/models.md)",
    )
    parser.add_argument("--arch", help=ARCH_HELP + "; default: inferred from the tensors")
    parser.add_argument(
        "--classes", type=values.whole, metavar="N", help="number of classes; default: inferred from the tensors"
    )
    parser.add_argument(
        "--input", type=values.shape, metavar="CxHxW",
        help="image shape (default: from the file or the library of --arch, else 3x32x32)",
    )  # fmt: skip
    parser.add_argument(
        "--mean", type=values.constants, nargs="+", metavar="X",
        help="mean for normalising inputs, pixels in 0..1: one number, one per channel, or the name of a data set, such as "
        "imagenet, cifar10 or mnist, which sets --std too; auto: the constants that fit the BatchNorm statistics best "
        "(default: from the file or the library of --arch, else 0)",
    )  # fmt: skip
    parser.add_argument(
        "--std",
        type=values.constants,
        nargs="+",
        metavar="X",
        help="standard deviation, given like --mean (default: as for --mean, else 1)",
    )
    parser.add_argument(
        "--weights", metavar="KEY", help="which of several state dicts in the file to use, such as model_ema"
    )
    parser.add_argument("--output", metavar="NAME", help="which of several outputs holds the logits, by name or number")


LONG = 3600
"""Seconds above which a run needs confirmation."""


def affordable(
    args: argparse.Namespace, suspect: Suspect, what: Survey | Defense, *, twice: bool = False, name: str = "this"
) -> None:
    """Prints the estimated cost of a run, called `name`, and asks for confirmation if it exceeds an hour.

    Raises:
        Refused: The run was not confirmed.
    """
    if getattr(args, "resume", False):
        return
    with vendor.running(suspect.info.code):
        cost = costing.of(suspect, what, args.device, args.precision, twice=twice)
    if cost is None:
        return
    shown.tell(args, f"note: {name} will take at most {cost}")
    if cost.seconds <= LONG or args.yes:
        return
    if sys.stdin.isatty() and sys.stderr.isatty():
        print("continue? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise Refused(f"{name} would take {cost}: add --yes to run it anyway")


def add_machine(parser: Parser) -> None:
    """Adds device, precision and seed."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="precision of the computation; auto: bf16 where the device supports it natively, for the preset fast and for "
        "searches, else fp32 (default: auto)",
    )
    parser.add_argument("--seed", type=values.seed, default=0, help="seed of everything random (default: 0)")


def add_yes(parser: Parser) -> None:
    """Adds the confirmation of what `affordable` asks."""
    parser.add_argument("--yes", action="store_true", help="do not ask before a run that would take over an hour")


def add_run(parser: Parser, usual: str) -> None:
    """Adds the options of a defence's run, whose folder is `usual` by default."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder for the results (default: {usual})")
    parser.add_argument("--also", choices=["onnx"], help="also write the cleaned model in this format")
    add_machine(parser)
    _add_earlier(parser)


def _add_earlier(parser: Parser) -> None:
    """Adds what becomes of an earlier run in the folder, and how often the state is saved."""
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="resume the interrupted run in --out")
    earlier.add_argument("--overwrite", action="store_true", help="start over, replacing an earlier run in --out")
    parser.add_argument(
        "--checkpoint-every",
        type=values.seconds,
        default=30.0,
        metavar="S",
        help="seconds between two checkpoints (default: 30)",
    )


def add_search(parser: Parser, usual: str) -> None:
    """Adds the options of a search, whose folder is `usual` by default."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder for record and report (default: {usual})")
    add_yes(parser)
    add_machine(parser)
    _add_earlier(parser)


def add_evidence(parser: Parser, *, needed: bool) -> None:
    """Adds data, trigger and target class to measure with."""
    group = parser.add_argument_group("measuring" + ("" if needed else " (the method itself never sees these)"))
    group.add_argument("--data", required=needed, help=DATA_HELP)
    group.add_argument(
        "--split",
        choices=["auto", "train", "test", "all"],
        default="auto",
        help="part of the data (default: test where the data has one)",
    )
    _add_trigger(group)


def add_lent(parser: Parser) -> None:
    """Adds data for defences that need clean images, and data, trigger and target class to measure with."""
    group = parser.add_argument_group("data (measured on the test part, which no defence sees)")
    group.add_argument("--data", help=f"{DATA_HELP}; defences that need images get its training part")
    group.add_argument(
        "--clean", metavar="DATA", help="give defences these images instead; all of --data may then be measured on"
    )
    group.add_argument(
        "--images", type=values.whole, default=2000, metavar="N", help="how many images defences get (default: 2000)"
    )
    _add_trigger(group)


def _add_trigger(group: argparse._ActionsContainer) -> None:
    """Adds class names, trigger and target class to measure with."""
    add_class_names(group)
    group.add_argument("--trigger", help=TRIGGER_HELP)
    group.add_argument(
        "--target",
        type=values.target,
        metavar="T",
        help="target class of the trigger; next: the class after each image's own",
    )
    group.add_argument("--source", type=int, metavar="S", help="source class, if the trigger is for one class only")


def add_class_names(group: argparse._ActionsContainer) -> None:
    """Adds the file of class names."""
    group.add_argument(
        "--class-names", type=Path, metavar="FILE",
        help="text file with a class name per line, in the order of the model's classes; image folders are matched to them",
    )  # fmt: skip


def add_output(parser: Parser) -> None:
    """Adds the options of the output."""
    parser.add_argument("--quiet", action="store_true", help="print no progress, but results and notes")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout, everything else on stderr"
    )


def suspect(args: argparse.Namespace) -> Suspect:
    """Loads the model given on the command line."""
    found = suspects.load(
        args.model, arch=args.arch, classes=args.classes, input_shape=args.input, mean=_constants("mean", args.mean),
        std=_constants("std", args.std), weights=args.weights, output=args.output,
    )  # fmt: skip
    with vendor.running(found.info.code):
        _ = found.flagged  # a cached property that runs the network
    return found


def _constants(name: str, given: list[list[float] | str] | None) -> list[float] | str | None:
    if given is None:
        return None
    found: list[float] = []
    for part in given:
        if isinstance(part, str):
            if len(given) > 1:
                raise Refused(f"--{name} {part}: give either one name or numbers")
            return part
        found += part
    return found


def images(args: argparse.Namespace, source: str, split: Split, suspect: Suspect) -> Images:
    """Loads data with its classes in the model's order, and prints notes about it."""
    order = class_names(args.class_names) if args.class_names else suspect.info.names
    found = load(source, split, suspect.info.input, classes=suspect.info.classes, order=order)
    shown.notes(args, found.notes)
    return found


def evidence(args: argparse.Namespace, suspect: Suspect) -> Evidence | None:
    """The data, trigger and target class to measure with; None without --data."""
    if args.data is None:
        if args.trigger or args.target is not None:
            raise Refused("--trigger and --target need --data to measure on")
        return None
    if args.source is not None and args.trigger is None:
        raise Refused("--source needs --trigger and --target")
    if (args.trigger is None) != (args.target is None):
        raise Refused("give both --trigger and --target, or neither")
    split = part_to_measure(args.data) if args.split == "auto" else args.split
    measured = images(args, args.data, split, suspect)
    trigger = parse(args.trigger, suspect.info.input) if args.trigger else None
    return Evidence(measured, args.data, trigger, args.target, args.source)


def options(args: argparse.Namespace, evidence: Evidence | None, out: Path, progress: Progress) -> Options:
    """The options of `add_run` for one run of a defence."""
    return Options(
        seed=args.seed, device=args.device, precision=args.precision, evidence=evidence, out=out, resume=args.resume,
        overwrite=args.overwrite, also=args.also, checkpoint_every=args.checkpoint_every, watch=progress.round_info,
        parts=progress.part,
        inputs=inputs(args), command=args.command,
    )  # fmt: skip


def searching(args: argparse.Namespace, survey: Survey, out: Path, progress: Progress) -> Searching:
    """The options of `add_search` for one search."""
    return Searching(
        survey=survey, seed=args.seed, device=args.device, precision=args.precision, out=out, resume=args.resume,
        overwrite=args.overwrite, checkpoint_every=args.checkpoint_every, watch=progress.round, parts=progress.part, inputs=inputs(args), command=args.command,
    )  # fmt: skip


def inputs(args: argparse.Namespace) -> list[Path]:
    """Existing files and folders that the command names besides its model."""
    named = [str(getattr(args, name, None) or "") for name in ("data", "clean", "trigger", "arch", "image", "images")]
    parts = [part for text in named for part in (text, text.partition(":")[0], text.rpartition(":")[0]) if part]
    return [Path(part) for part in dict.fromkeys(parts) if os.path.lexists(part.replace("\0", ""))]
