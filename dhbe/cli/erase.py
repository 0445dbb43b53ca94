"""`dhbe erase MODEL`: gives back a classifier of the same form without its backdoor."""

from collections.abc import Sequence
from pathlib import Path

from dhbe import api, ranks
from dhbe.cli import arguments, gates, settings, shown, vendor
from dhbe.cli.codes import DONE
from dhbe.cli.parser import Parser
from dhbe.defenses import PRESETS
from dhbe.progress import Progress
from dhbe.settings import RENAMED


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code: 1 if by its own signs the result still answers or is damaged, or a gate failed."""
    with ranks.joined() as first:
        return _erased(argv, first=first)


def _erased(argv: Sequence[str], *, first: bool) -> int:
    """The same in one of several processes, of which the first alone measures, writes and tells."""
    args = _parser(argv).parse_args(argv)
    args.quiet = args.quiet or not first
    suspect = arguments.suspect(args)
    evidence = arguments.evidence(args, suspect)
    gates.check(args, evidence)
    out = args.out or Path("runs") / args.model.stem
    if first:
        shown.notes(args, suspect.notes)
    defense = settings.changed(PRESETS[args.preset], args)
    arguments.affordable(args, suspect, defense)
    running = vendor.running(suspect.info.code)
    with Progress(defense.rounds, f"erasing {args.model.name}", args.quiet, folder=out) as progress, running:
        options = arguments.options(args, evidence, out, progress)
        record = api.erase(suspect, preset=args.preset, defense=defense, **options).record
    if not first:
        return DONE
    shown.notes(args, record.warnings)
    shown.erased(args, record, out)
    return gates.passed(args, record)


def parsers() -> dict[str, Parser]:
    """By what stands behind the verb: nothing."""
    return {"": _parser([])}


def _parser(argv: Sequence[str]) -> Parser:
    parser = Parser(
        "erase",
        "  dhbe erase vendor.pt --arch resnet18 --classes 10 --mean .491 .482 .447 --std .247 .243 .262\n"
        "  dhbe erase vendor.pth --arch vendor/model.py:build --classes 10 --input 3x32x32 --out cleaned\n"
        "  dhbe erase suspect.safetensors --data test.npz --trigger badnets:3 --target 9 --max-asr .05",
        description="Gives back a classifier of the same form that no longer answers to a hidden trigger. No data needed. "
        "Exit code 1 if by its own signs the result still answers or is damaged, or a gate failed; it is written all the same.",
    )
    arguments.add_model(parser)
    early = Parser(add_help=False)  # the preset says which settings there are
    for each in (early, parser):
        each.add_argument("--preset", default="fast", choices=list(PRESETS), help="fast: ours; paper, official: exact")
    arguments.add_run(parser)
    arguments.add_evidence(parser, needed=False)
    gates.add(parser)
    arguments.add_output(parser)
    preset = early.parse_known_args(argv)[0].preset
    settings.add(parser, type(PRESETS[preset]), f"settings of {preset}", PRESETS[preset], RENAMED)
    return parser
