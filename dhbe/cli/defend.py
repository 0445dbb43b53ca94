"""`dhbe defend NAME MODEL`: runs a defence of other authors."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dhbe import api
from dhbe.cli import arguments, gates, settings, shown, vendor
from dhbe.cli.codes import DONE
from dhbe.cli.parser import Parser, meant
from dhbe.data import Images, part_to_measure
from dhbe.defenses import PEERS, Defense
from dhbe.errors import Refused
from dhbe.progress import Progress
from dhbe.suspects import Suspect


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return DONE
    if argv[0] not in PEERS:
        raise Refused(
            f"no defence {argv[0]!r}{meant(argv[0], PEERS)}; available: {', '.join(PEERS)} (see dhbe defend --help)"
        )
    kind = PEERS[argv[0]]
    args = _parser(kind).parse_args(argv[1:])
    suspect, defense = arguments.suspect(args), settings.changed(kind(), args)
    if args.clean == args.data:  # never measure on a defence's images
        args.clean = None
    args.split, target = "auto" if args.clean else "test", args.target
    if target is None and "target class" in kind.needs:
        raise Refused(f"{kind.name} needs the target class: give --target NUMBER")
    if target == "next" and "target class" in kind.needs:
        raise Refused(f"{kind.name} needs a single target class: give --target NUMBER")
    if args.trigger is None:
        args.target = None  # it is only the defender's knowledge then
    clean = _lent(args, kind, suspect) if "clean images" in kind.needs else None
    evidence = arguments.evidence(args, suspect)
    gates.check(args, evidence)
    out = args.out or Path("runs") / f"{args.model.stem}-{kind.name}"
    shown.notes(args, suspect.flagged)
    running = vendor.running(suspect.info.code)
    with Progress(defense.rounds, f"{kind.name} on {args.model.name}", args.quiet, folder=out) as progress, running:
        record = api.defend(
            suspect, defense, clean=clean, source=args.clean or args.data or "", images=args.images,
            target=None if target == "next" else target, **arguments.options(args, evidence, out, progress),
        ).record  # fmt: skip
    shown.notes(args, record.warnings)
    shown.erased(args, record, out)
    return gates.passed(args, record)


def _lent(args: argparse.Namespace, kind: type[Defense], suspect: Suspect) -> Images:
    """The clean images for a defence that needs them."""
    source = args.clean or args.data
    if source is None:
        raise Refused(f"{kind.name} needs clean images: give --data or --clean")
    whole = args.clean and part_to_measure(source) == "all"
    return arguments.images(args, source, "all" if whole else "train", suspect)


def _needs(kind: type[Defense]) -> str:
    return " and ".join(sorted(kind.needs)) or "nothing"


def _overview() -> str:
    names = "\n".join(f"  {name:16} needs {_needs(kind)}" for name, kind in PEERS.items())
    return (
        f"usage: dhbe defend NAME MODEL --data DATA (see dhbe defend NAME --help)\n\n{names}\n\n"
        "examples:\n  dhbe defend clp vendor.pt --arch resnet18 --classes 10\n"
        "  dhbe defend nad suspect.safetensors --data cifar10 --trigger badnets:3 --target 9 --out cleaned"
    )


def parsers() -> dict[str, Parser]:
    """Parsers by name of the defence."""
    return {name: _parser(kind) for name, kind in PEERS.items()}


def _parser(kind: type[Defense]) -> Parser:
    known = " --target 9" if "target class" in kind.needs else ""
    parser = Parser(
        f"defend {kind.name}",
        f"  dhbe defend {kind.name} vendor.pt --arch resnet18 --data cifar10{known}\n"
        f"  dhbe defend {kind.name} suspect.safetensors --data cifar10 --trigger badnets:3 --target 9 --out cleaned",
        description=f"Needs {_needs(kind)} besides the model.",
    )
    arguments.add_model(parser)
    arguments.add_run(parser, f"runs/MODEL-{kind.name}")
    arguments.add_lent(parser)
    gates.add(parser)
    arguments.add_output(parser)
    settings.add(parser, kind, f"settings of {kind.name}", kind())
    return parser
