"""`dhbe compare MODEL`: runs several defences on one model and writes one report."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dhbe import api, files, foreign, report, runs
from dhbe.cli import arguments, shown, vendor
from dhbe.cli.codes import DONE
from dhbe.cli.parser import Parser, meant
from dhbe.data import Images, part_to_measure
from dhbe.defenses import PEERS, PRESETS, Defense
from dhbe.errors import Refused
from dhbe.progress import Progress
from dhbe.records import Record
from dhbe.suspects import Suspect


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code."""
    args = parser().parse_args(argv)
    every = {**PRESETS, **{name: kind() for name, kind in PEERS.items()}}
    for name in args.defenses:
        if name not in every:
            raise Refused(f"no defence {name!r}{meant(name, every)}; available: {', '.join(every)}")
    suspect, target = arguments.suspect(args), args.target
    shown.notes(args, suspect.flagged)
    chosen = {name: every[name] for name in dict.fromkeys(args.defenses)}
    if args.clean == args.data:  # never measure on a defence's images
        args.clean = None
    args.split = "auto" if args.clean else "test"
    needs = {need for defense in chosen.values() for need in defense.needs}
    if "target class" in needs and not isinstance(target, int):
        raise Refused("one of these defences needs the target class: give --target NUMBER")
    if args.trigger is None:
        args.target = None  # it is only the defender's knowledge then
    clean = _lent(args, suspect) if "clean images" in needs else None
    evidence = arguments.evidence(args, suspect)
    out = args.out or Path("runs") / f"{args.model.stem}-compare"
    for name, defense in chosen.items():
        arguments.affordable(args, suspect, defense, name=name)
    records = {}
    for name, defense in chosen.items():
        with (
            Progress(defense.rounds, f"{name} on {args.model.name}", args.quiet, folder=out / name) as progress,
            vendor.running(suspect.info.code),
        ):
            options = arguments.options(args, evidence, out / name, progress)
            records[name] = _ran(suspect, name, defense, clean, args, target, options)
        shown.tell(args, f"{name}: {report.line(records[name])}")
    files.write(out / runs.REPORT, report.compared(suspect.info, records))
    told = shown.envelope("compare", None, f"{len(records)} defences", suspect.info.sha256, None)
    content = {name: record.model_dump(mode="json", exclude={"curve"}) for name, record in records.items()}
    lines = [*_table(records), f"see {foreign.name(out / runs.REPORT)}"]
    shown.show(args, {**told, "defenses": content}, lambda: "\n".join(lines))
    return DONE


def _ran(
    suspect: Suspect, name: str, defense: Defense, clean: Images | None, args: argparse.Namespace, target: object,
    options: api.Options,
) -> Record:  # fmt: skip
    if name in PRESETS:
        return api.erase(suspect, preset=name, **options).record
    known = target if isinstance(target, int) else None
    source = args.clean or args.data or ""
    return api.defend(suspect, defense, clean=clean, source=source, images=args.images, target=known, **options).record


def _lent(args: argparse.Namespace, suspect: Suspect) -> Images:
    """The clean images for defences that need them."""
    source = args.clean or args.data
    if source is None:
        raise Refused("one of these defences needs clean images: give --data or --clean")
    whole = args.clean and part_to_measure(source) == "all"
    return arguments.images(args, source, "all" if whole else "train", suspect)


def _table(records: dict[str, Record]) -> list[str]:
    width = max(len(name) for name in records)
    return [f"{name:{width}}  {record.seconds:>6.0f} s  {report.line(record)}" for name, record in records.items()]


def parser() -> Parser:
    """The verb's options."""
    parser = Parser(
        "compare",
        "  dhbe compare victim/backdoored.safetensors --defenses fast clp nad --data cifar10 --trigger badnets:3 --target 9\n"
        "  dhbe compare vendor.pt --arch resnet18 --mean cifar10 --defenses fast clp",
        description="Runs several defences with their default settings on one model, each into a folder of its own below "
        "--out, and writes one report there. A comparison that was interrupted goes on with --resume.",
    )
    arguments.add_model(parser)
    parser.add_argument(
        "--defenses", nargs="+", required=True, metavar="NAME", help=f"any of {', '.join([*PRESETS, *PEERS])}"
    )
    arguments.add_run(parser, "runs/MODEL-compare")
    arguments.add_yes(parser)
    arguments.add_lent(parser)
    arguments.add_output(parser)
    return parser
