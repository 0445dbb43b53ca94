"""`dhbe attack NAME`: trains a backdoored classifier to practise on."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dhbe import api, foreign, suspects
from dhbe.attacks import ALL, Attack
from dhbe.attacks.triggers import MAKERS, summary, usage
from dhbe.cli import arguments, settings, shown, values, vendor
from dhbe.cli.codes import DONE
from dhbe.cli.parser import Parser, meant
from dhbe.data import DIGITS, KNOWN, class_names, load
from dhbe.errors import Refused
from dhbe.progress import Progress
from dhbe.settings import changed, flat
from dhbe.training import RECIPES, Fit

FEW, SHARE_OF_FEW = 5000, 0.1
"""Number of training images below which an attack uses a larger poison rate, this one, and smaller batches."""


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return DONE
    if argv[0] not in ALL:
        raise Refused(
            f"no attack {argv[0]!r}{meant(argv[0], ALL)}; available: {', '.join(ALL)} (see dhbe attack --help)"
        )
    kind = ALL[argv[0]]
    args = _parser(kind, argv[1:]).parse_args(argv[1:])
    order = class_names(args.class_names) if args.class_names else ()
    train, test = (load(args.data, part, args.input, order=order) for part in ("train", "test"))
    shown.notes(args, train.notes)
    how, fit = settings.changed(kind(), args), settings.changed(RECIPES[args.recipe], args)
    if args.recipe == "usual":
        suited = _suited(args, how, fit, len(train))
        how, fit = changed(how, suited), changed(fit, suited)
        if suited:
            options = " ".join(shown.option(name, value) for name, value in suited.items())
            shown.notes(args, [f"{args.data} has {len(train):,} training images: using {options} unless given"])
    clean = suspects.load(args.clean, input_shape=train.shape) if args.clean else None
    running = vendor.running(suspects.vendor_code(args.arch))
    epochs = sum(each.epochs for each, _ in how.trainings(fit, clean=clean is not None))
    precision = args.precision or ("auto" if args.recipe == "fast" else "fp32")
    with Progress(epochs, f"training {args.arch} with {kind.name}", args.quiet) as progress, running:
        record = api.attack(
            how, train, test, arch=args.arch, out=args.out, data=args.data, fit=fit, seed=args.seed, device=args.device,
            precision=precision, clean=clean, fine_tune=args.fine_tune, force=args.force, resume=args.resume,
            overwrite=args.overwrite, watch=progress.epoch, inputs=arguments.inputs(args),
            command=args.command,
        )  # fmt: skip
    before = record.before
    assert before is not None
    shown.notes(args, record.warnings)
    content = record.model_dump(mode="json")
    table = [shown.rates({"trained": before}), foreign.name(args.out / str(record.model.path))]
    shown.recorded(args, record, args.out, lambda: table, content)
    return DONE


def _suited(args: argparse.Namespace, how: Attack, fit: Fit, images: int) -> dict[str, Any]:
    """Settings adapted to the data, unless given: a few poisoned images, or flipped digits, plant no backdoor."""
    wanted: dict[str, Any] = {}
    if images < FEW:
        wanted = {"rate": SHARE_OF_FEW, "epochs": 10, "batch": 32, "crop": 0}
    if args.data in DIGITS or (args.data in KNOWN and not KNOWN[args.data].mirrored):
        wanted["flip"] = False
    usual = flat(how) | flat(fit)
    return {
        name: value
        for name, value in wanted.items()
        if name in usual and getattr(args, name, None) is None and (name != "rate" or usual[name] < value)
    }


def _overview() -> str:
    """All attacks and all triggers, one line each."""
    made = [(usage(name), summary(name)) for name in MAKERS]
    width = max(len(text) for text, _ in made)
    return "\n".join(
        [
            "usage: dhbe attack NAME --data DATA --arch ARCH --out DIR (see dhbe attack NAME --help)",
            "",
            "attacks:",
            *(f"  {name:11} {kind.summary}" for name, kind in ALL.items()),
            "",
            "triggers, for --trigger of other verbs:",
            *(f"  {text:{width}}  {what}" for text, what in made),
            "  each optionally followed by :opacity=SHARE :scale=FACTOR :at=PLACE :copies=4 or 9; or an .npz or .json file",
        ]
    )


def parsers() -> dict[str, Parser]:
    """Parsers by name of the attack."""
    return {name: _parser(kind, []) for name, kind in ALL.items()}


def _parser(kind: type[Attack], argv: Sequence[str]) -> Parser:
    parser = Parser(
        f"attack {kind.name}",
        f"  dhbe attack {kind.name} --data digits --arch resnet8 --out practice\n"
        f"  dhbe attack {kind.name} --data cifar10 --arch resnet18 --out victim --recipe fast\n"
        f"  dhbe attack {kind.name} --data cifar10 --arch resnet18 --out victim --recipe fast --resume",
        description=f"{kind.summary[0].upper()}{kind.summary[1:]}. Trains a classifier and measures it on test images.",
    )
    parser.add_argument("--data", required=True, help=arguments.DATA_HELP)
    parser.add_argument("--arch", required=True, help=arguments.ARCH_HELP)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for model, trigger and record")
    parser.add_argument("--input", type=values.shape, metavar="CxHxW", help="shape to which image files are converted")
    arguments.add_class_names(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        help="precision of the training (default: auto with --recipe fast, else fp32)",
    )
    parser.add_argument("--seed", type=values.seed, default=0, help="seed of everything random (default: 0)")
    parser.add_argument(
        "--clean",
        type=Path,
        metavar="MODEL",
        help="a clean model: its ACC is compared, and trojaning starts from it",
    )
    parser.add_argument(
        "--fine-tune",
        action="store_true",
        help="start from the weights of --clean instead of from scratch, which needs fewer epochs",
    )
    parser.add_argument(
        "--force", action="store_true", help="keep the model even if the attack misses its goals; the record says so"
    )
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="resume the interrupted run in --out")
    earlier.add_argument("--overwrite", action="store_true", help="start over, replacing what --out holds")
    early = Parser(add_help=False)  # the recipe determines the defaults of the training's settings
    for each in (early, parser):
        each.add_argument(
            "--recipe", default="usual", choices=list(RECIPES),
            help="training recipe: usual; fast, for a large network on a small machine; paper, that of the DHBE paper",
        )  # fmt: skip
    recipe = early.parse_known_args(argv)[0].recipe
    arguments.add_output(parser)
    settings.add(parser, kind, "settings of the attack", kind())
    settings.add(parser, Fit, f"settings of the training, recipe {recipe}", RECIPES[recipe])
    return parser
