"""Groups of options that several verbs share, and what they come to."""

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

TRIGGER_HELP = "as badnets:3 (dhbe attack --help lists them), an .npz with pattern and mask, or a file that dhbe wrote"
DATA_HELP = (
    "digits, digits16, cifar10, cifar100, another data set in $DHBE_DATA, an image folder (one sub-folder a class), "
    "or an .npz"
)
ARCH_HELP = "name of the zoo, torchvision:NAME, timm:NAME, file.py:function or package.module:function (runs that code)"


def add_model(parser: Parser) -> None:
    """Which model, and how it is built and fed."""
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help=".safetensors, .pt/.pth/.ckpt/... that holds tensors, a Hugging Face folder, .onnx, or .npz (docs/models.md)",
    )
    parser.add_argument("--arch", help=ARCH_HELP + "; default: as the tensors tell")
    parser.add_argument(
        "--classes", type=values.whole, metavar="N", help="number of classes; default: as the tensors tell"
    )
    parser.add_argument(
        "--input", type=values.shape, metavar="CxHxW",
        help="shape of the images (default: as the file or the library of --arch says, else 3x32x32)",
    )  # fmt: skip
    parser.add_argument(
        "--mean", type=values.constants, nargs="+", metavar="X",
        help="mean that inputs are normalised with, pixels in 0..1: one number, one a channel, or the name of a data set, as "
        "imagenet, cifar10 or mnist, which tells the standard deviation too; auto: what fits the BatchNorm statistics best "
        "(default: as the file or the library of --arch says, else 0)",
    )  # fmt: skip
    parser.add_argument(
        "--std", type=values.constants, nargs="+", metavar="X", help="the standard deviation likewise (default: else 1)"
    )
    parser.add_argument("--weights", metavar="KEY", help="which of several state dicts in the file, as model_ema")
    parser.add_argument("--output", metavar="N", help="which of several outputs the logits are, by number or name")


LONG = 3600
"""Seconds from which on it is asked whether a run is meant."""


def affordable(args: argparse.Namespace, suspect: Suspect, what: Survey | Defense, *, twice: bool = False) -> None:
    """Says what a run will cost, and asks where that is more than an hour.

    Raises:
        Refused: It is, and nobody said yes.
    """
    if getattr(args, "resume", False):
        return
    with vendor.running(suspect.info.code):
        cost = costing.of(suspect, what, args.device, args.precision, twice=twice)
    if cost is None:
        return
    shown.tell(args, f"note: this will take {cost} at the most")
    if cost.seconds <= LONG or args.yes:
        return
    if sys.stdin.isatty() and sys.stderr.isatty():
        print("go on? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise Refused(f"this would take {cost}: add --yes if that is meant")


def add_machine(parser: Parser) -> None:
    """What computes."""
    parser.add_argument("--yes", action="store_true", help="do not ask, however long it will take")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="default: auto")
    parser.add_argument("--seed", type=values.seed, default=0, help="seed of everything random (default: 0)")


def add_run(parser: Parser) -> None:
    """Where a defence runs and what becomes of it."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: one below runs)")
    parser.add_argument("--also", choices=["onnx"], help="write the cleaned model in this form too")
    add_machine(parser)
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    earlier.add_argument("--overwrite", action="store_true", help="begin anew over an earlier run in --out")
    parser.add_argument(
        "--checkpoint-every",
        type=values.seconds,
        default=30.0,
        metavar="S",
        help="seconds between two checkpoints (default: 30)",
    )


def add_search(parser: Parser) -> None:
    """Where a search runs and what becomes of it."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: one below runs)")
    parser.add_argument("--overwrite", action="store_true", help="begin anew over an earlier run in --out")
    add_machine(parser)


def add_evidence(parser: Parser, *, needed: bool) -> None:
    """What is measured with."""
    group = parser.add_argument_group("measuring" + ("" if needed else " (the method itself never sees these)"))
    group.add_argument("--data", required=needed, help=DATA_HELP)
    group.add_argument(
        "--split",
        choices=["auto", "train", "test", "all"],
        default="auto",
        help="part of the data (default: test where the data has one)",
    )
    add_class_names(group)
    group.add_argument("--trigger", help=TRIGGER_HELP)
    group.add_argument(
        "--target",
        type=values.target,
        metavar="T",
        help="class that the trigger leads to; next: each image's own plus one",
    )
    group.add_argument("--source", type=int, metavar="S", help="the only class whose images the trigger is for")


def add_lent(parser: Parser) -> None:
    """What is lent to defences that need images, and what is measured with."""
    group = parser.add_argument_group("data (the test part measures, and no defence sees it)")
    group.add_argument("--data", help=f"{DATA_HELP}; its training part is lent to defences that need images")
    group.add_argument("--clean", metavar="DATA", help="lend these images instead; all of --data may measure then")
    group.add_argument(
        "--images", type=values.whole, default=2000, metavar="N", help="how many are lent (default: 2000)"
    )
    add_class_names(group)
    group.add_argument("--trigger", help=TRIGGER_HELP)
    group.add_argument("--target", type=values.target, metavar="T", help="class that the trigger leads to, or next")
    group.add_argument("--source", type=int, metavar="S", help="the only class whose images the trigger is for")


def add_class_names(group: argparse._ActionsContainer) -> None:
    """Which folder is which class."""
    group.add_argument(
        "--class-names", type=Path, metavar="FILE",
        help="names of the model's classes in their order, one a line; image folders are matched to them",
    )  # fmt: skip


def add_output(parser: Parser) -> None:
    """What is said, and where."""
    parser.add_argument("--quiet", action="store_true", help="no progress; notes stay")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, everything else on stderr")


def suspect(args: argparse.Namespace) -> Suspect:
    """The model that was named, loaded."""
    found = suspects.load(
        args.model, arch=args.arch, classes=args.classes, shape=args.input, mean=_constants("mean", args.mean),
        std=_constants("std", args.std), weights=args.weights, output=args.output,
    )  # fmt: skip
    with vendor.running(found.info.code):
        _ = found.notes  # runs the network, and is kept
    return found


def _constants(name: str, given: list[list[float] | str] | None) -> list[float] | str | None:
    if given is None:
        return None
    found: list[float] = []
    for part in given:
        if isinstance(part, str):
            if len(given) > 1:
                raise Refused(f"--{name} {part}: give a name alone, or numbers alone")
            return part
        found += part
    return found


def images(args: argparse.Namespace, source: str, split: Split, suspect: Suspect) -> Images:
    """Data for a model, its classes numbered as the model's are; what is worth knowing of it is said."""
    order = class_names(args.class_names) if args.class_names else suspect.info.names
    found = load(source, split, suspect.info.input, classes=suspect.info.classes, order=order)
    shown.notes(args, found.notes)
    return found


def evidence(args: argparse.Namespace, suspect: Suspect) -> Evidence | None:
    """The data that was named to measure on."""
    if args.data is None:
        if args.trigger or args.target is not None:
            raise Refused("--trigger and --target need --data to be measured on")
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
    """What `add_run` was told, for one run of a defence."""
    return Options(
        seed=args.seed, device=args.device, precision=args.precision, evidence=evidence, out=out, resume=args.resume,
        overwrite=args.overwrite, also=args.also, checkpoint_every=args.checkpoint_every, watch=progress.round_info,
        inputs=inputs(args), command=args.command,
    )  # fmt: skip


def searching(args: argparse.Namespace, survey: Survey, out: Path, progress: Progress) -> Searching:
    """What `add_search` was told, for one search."""
    return Searching(
        survey=survey, seed=args.seed, device=args.device, precision=args.precision, out=out, overwrite=args.overwrite,
        watch=progress.round, parts=progress.part, inputs=inputs(args), command=args.command,
    )  # fmt: skip


def inputs(args: argparse.Namespace) -> list[Path]:
    """Files and folders that the command names beside its model, if they are there."""
    named = [str(getattr(args, name, None) or "") for name in ("data", "clean", "trigger", "arch", "image")]
    parts = [part for text in named for part in (text, text.partition(":")[0], text.rpartition(":")[0]) if part]
    return [Path(part) for part in dict.fromkeys(parts) if os.path.lexists(part.replace("\0", ""))]
