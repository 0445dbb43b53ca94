"""`dhbe verify BEFORE AFTER`: searches a model before and after a defence, without data."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dhbe import api
from dhbe.cli import arguments, codes, gates, settings, shown, vendor
from dhbe.cli.parser import Parser
from dhbe.progress import Progress
from dhbe.records import Record
from dhbe.search import verify
from dhbe.search.survey import Survey
from dhbe.settings import RENAMED
from dhbe.suspects import Suspect


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code: 1 if the model after still responds to triggers, or is a different one."""
    args = parser().parse_args(argv)
    suspect, cleaned = arguments.suspect(args), _cleaned(args)
    shown.notes(args, [*suspect.flagged, *cleaned.warnings])
    evidence = arguments.evidence(args, suspect)
    survey = settings.changed(Survey(), args)
    arguments.affordable(args, suspect, survey, twice=True)
    out = args.out or Path("runs") / f"{args.model.stem}-verify"
    with (
        Progress(verify.rounds(survey), f"verifying {args.after.name}", args.quiet) as progress,
        vendor.running(suspect.info.code),
    ):
        options = arguments.searching(args, survey, out, progress)
        record = api.verify(suspect, cleaned, evidence=evidence, **options).record
    shown.notes(args, record.warnings)
    shown.recorded(args, record, out, lambda: _table(record))
    return codes.of(record.verdict, args.fail_on)


def parser() -> Parser:
    """The verb's options."""
    parser = Parser(
        "verify",
        "  dhbe verify vendor.pt runs/vendor/clean.safetensors --arch resnet18 --classes 10\n"
        "  dhbe verify victim/backdoored.safetensors runs/backdoored/clean.safetensors --json\n"
        "  dhbe verify before.safetensors after.safetensors --data test.npz --trigger badnets:3 --target 9",
        description="Searches a model before and after a defence on the same images. No data needed; with data and the "
        "trigger, a battery of residual risks is measured too. Exit code 1 if the model after still "
        "responds to a trigger or has become a different model, 3 if that is unclear.",
    )
    arguments.add_model(parser)
    parser.add_argument(
        "after",
        type=Path,
        metavar="AFTER",
        help="the model after the defence, with the architecture and input format of MODEL",
    )
    arguments.add_search(parser, "runs/MODEL-verify")
    arguments.add_evidence(parser, needed=False)
    gates.add_fail_on(parser)
    arguments.add_output(parser)
    settings.add(parser, Survey, "settings of the search", Survey(), RENAMED)
    return parser


def _cleaned(args: argparse.Namespace) -> Suspect:
    """Loads the model after; options fill in what its own header does not contain."""
    return arguments.suspect(argparse.Namespace(**{**vars(args), "model": args.after}))


def _table(record: Record) -> list[str]:
    assert record.before is not None
    assert record.after is not None
    columns = {"before": record.before, "after": record.after}
    return [*([shown.rates(columns)] if record.data else []), *shown.signs(columns)]
