"""`dhbe erase MODEL`: removes the backdoor from a classifier, without data."""

from collections.abc import Sequence
from pathlib import Path

from dhbe import api, ranks
from dhbe.cli import arguments, gates, settings, shown, values, vendor
from dhbe.cli.codes import DONE
from dhbe.cli.parser import Parser
from dhbe.defenses import PRESETS
from dhbe.progress import Progress
from dhbe.settings import RENAMED


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code: 1 if the verdict is `still answers` or `damaged`, or a gate failed."""
    with ranks.joined() as first:
        return _erased(argv, first=first)


def _erased(argv: Sequence[str], *, first: bool) -> int:
    """`run` in one of several processes; only the `first` measures, writes and prints."""
    args = parser(argv).parse_args(argv)
    args.quiet = args.quiet or not first
    suspect = arguments.suspect(args)
    evidence = arguments.evidence(args, suspect)
    gates.check(args, evidence)
    out = args.out or Path("runs") / args.model.stem
    if first:
        shown.notes(args, suspect.flagged)
    defense = settings.changed(PRESETS[args.preset], args)
    arguments.affordable(args, suspect, defense)
    running = vendor.running(suspect.info.code)
    with Progress(defense.rounds, f"erasing {args.model.name}", args.quiet, folder=out) as progress, running:
        options = arguments.options(args, evidence, out, progress)
        options["budget"] = args.budget
        record = api.erase(suspect, preset=args.preset, defense=defense, images=args.images, **options).record
    if not first:
        return DONE
    shown.notes(args, record.warnings)
    shown.erased(args, record, out)
    return gates.passed(args, record)


def parser(argv: Sequence[str] = ()) -> Parser:
    """The verb's options, as far as they depend on words that were given."""
    parser = Parser(
        "erase",
        "  dhbe erase vendor.pt --arch resnet18 --classes 10 --mean .491 .482 .447 --std .247 .243 .262\n"
        "  dhbe erase vendor.pth --arch vendor/model.py:build --classes 10 --input 3x32x32 --out cleaned\n"
        "  dhbe erase suspect.safetensors --data test.npz --trigger badnets:3 --target 9 --max-asr .05",
        description="Removes a backdoor from a classifier, whose architecture and file format stay the same. No data needed. "
        "Exit code 1 if the verdict is `still answers` or `damaged`, or a gate failed; the result is written anyway.",
    )
    arguments.add_model(parser)
    early = Parser(add_help=False)  # the preset determines the settings
    for each in (early, parser):
        each.add_argument(
            "--preset",
            default="fast",
            choices=list(PRESETS),
            help="fast: our method; paper, official: exactly as published",
        )
    parser.add_argument(
        "--images", type=Path, metavar="DIR",
        help="a folder of any pictures, without labels, from which fast cuts its images instead of two photographs; they help "
        "most where they resemble what the model was trained on",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=values.seconds, metavar="MINUTES",
        help="time after which fast begins no further cycle; it takes up to three (--cycles) until no class stands out",
    )  # fmt: skip
    arguments.add_run(parser, "runs/MODEL")
    arguments.add_yes(parser)
    arguments.add_evidence(parser, needed=False)
    gates.add(parser)
    arguments.add_output(parser)
    preset = early.parse_known_args(argv)[0].preset
    settings.add(parser, type(PRESETS[preset]), f"settings of {preset}", PRESETS[preset], RENAMED)
    return parser
