"""`dhbe scan MODEL`: searches a classifier for a backdoor, without data."""

from collections.abc import Sequence
from pathlib import Path

from dhbe import api, files, foreign, runs, sarif
from dhbe.cli import arguments, codes, gates, settings, shown, vendor
from dhbe.cli.parser import Parser
from dhbe.errors import Refused
from dhbe.progress import Progress
from dhbe.records import UNSEARCHED, Record
from dhbe.search.survey import Survey
from dhbe.settings import RENAMED


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code: 1 if a backdoor was found."""
    args = parser().parse_args(argv)
    suspect = arguments.suspect(args)
    if args.sarif and not args.sarif.absolute().parent.is_dir():
        raise Refused(f"--sarif {foreign.name(args.sarif)}: there is no folder {foreign.name(args.sarif.parent)}")
    if args.sarif and any(runs.same(args.sarif, path) for path in suspect.files):
        raise Refused(f"--sarif {foreign.name(args.sarif)} would replace the scanned model: give another file")
    shown.notes(args, suspect.flagged)
    survey = settings.changed(Survey(), args)
    arguments.affordable(args, suspect, survey)
    out = args.out or Path("runs") / f"{args.model.stem}-scan"
    with (
        Progress(survey.rounds, f"scanning {args.model.name}", args.quiet) as progress,
        vendor.running(suspect.info.code),
    ):
        options = arguments.searching(args, survey, out, progress)
        record = api.scan(suspect, **options).record
    shown.notes(args, record.warnings)
    if args.sarif:
        files.write(args.sarif, sarif.log(record))
    shown.recorded(args, record, out, lambda: _table(record), _content(record))
    return codes.of(record.verdict, args.fail_on)


def parser() -> Parser:
    """The verb's options."""
    parser = Parser(
        "scan",
        "  dhbe scan vendor.pt --arch resnet18 --classes 10 --mean .491 .482 .447 --std .247 .243 .262\n"
        "  dhbe scan suspect.safetensors --json",
        description="Searches a model for a backdoor, class by class. No data needed. Exit code 1 if one was found, 3 if that is "
        "unclear or the model cannot be judged.",
    )
    arguments.add_model(parser)
    arguments.add_search(parser, "runs/MODEL-scan")
    gates.add_fail_on(parser)
    arguments.add_output(parser)
    parser.add_argument(
        "--sarif", type=Path, metavar="FILE", help="also write the finding to this file, as SARIF 2.1.0 for CI systems"
    )
    settings.add(parser, Survey, "settings of the search", Survey(), RENAMED)
    return parser


def _content(record: Record) -> dict[str, object]:
    assert record.before is not None
    signs = record.before.signs
    return {
        "backdoored": record.backdoored,
        "target": int(signs["suspected_class"]) if record.backdoored else None,
        "index": signs["anomaly_index"],
        "probability": signs["probability"],
        "verdict": record.verdict,
        "classes": [found.model_dump(mode="json") for found in record.classes],
        "warnings": record.warnings,
        "seconds": record.seconds,
    }


def _table(record: Record) -> list[str]:
    lines = [f"{'class':>5}{'index':>8}{'margin':>8}{'success':>9}  trigger"]
    lines += [
        f"{label:>5}{found.index:>8.1f}{found.margin:>8.1f}{found.success_rate:>9.0%}  {found.family}"
        for label, found in enumerate(record.classes)
        if found.family != UNSEARCHED
    ]
    return lines
