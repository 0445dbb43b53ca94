"""`dhbe scan MODEL`: searches a classifier for a backdoor, without data."""

from collections.abc import Sequence
from pathlib import Path

from dhbe import api, foreign
from dhbe.cli import arguments, settings, shown, vendor
from dhbe.cli.codes import DONE, GATE
from dhbe.cli.parser import Parser
from dhbe.defenses import PRESETS
from dhbe.progress import Progress
from dhbe.records import Record
from dhbe.search.survey import Survey


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code: 1 if a backdoor was found."""
    parser = Parser(
        "scan",
        "  dhbe scan vendor.pt --arch resnet18 --classes 10 --mean .491 .482 .447 --std .247 .243 .262\n"
        "  dhbe scan suspect.safetensors --json",
        description="Searches a model for a backdoor, class by class. No data needed. Exit code 1 if one was found.",
    )
    arguments.add_model(parser)
    arguments.add_search(parser)
    arguments.add_output(parser)
    settings.add(parser, Survey, "settings of the search", PRESETS["fast"])
    args = parser.parse_args(argv)
    suspect = arguments.suspect(args)
    shown.notes(args, suspect.warnings)
    survey = arguments.survey(args)
    out = args.out or Path("runs") / f"{args.model.stem}-scan"
    with (
        Progress(survey.longest, f"scanning {args.model.name}", args.quiet) as progress,
        vendor.running(suspect.info.code),
    ):
        options = arguments.searching(args, survey, out, progress)
        record = api.scan(suspect, **options).record
    shown.notes(args, record.warnings[len(suspect.warnings) :])
    shown.show(args, _content(record), lambda: _text(record, out))
    return GATE if record.backdoored else DONE


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
        "seconds": record.seconds,
    }


def _text(record: Record, out: Path) -> str:
    assert record.before is not None
    signs = record.before.signs
    lines = [f"{'class':>5}{'index':>8}{'lead':>8}{'success':>9}  trigger"]
    lines += [
        f"{label:>5}{found.index:>8.1f}{found.lead:>8.1f}{found.success:>9.0%}  {found.family}"
        for label, found in enumerate(record.classes)
    ]
    label, index, chance = int(signs["suspected_class"]), signs["anomaly_index"], signs["probability"]
    said = {
        "backdoored": f"backdoored: class {label} stands out",
        "unclear": f"unclear: class {label} stands out somewhat",
        "nothing found": "no backdoor found",
    }[record.verdict or "unclear"]
    lines.append(f"{said} (index {index:.1f}, probability {chance:.0%} if half of all models are backdoored)")
    return "\n".join([*lines, f"{record.seconds:.0f} s; see {foreign.name(out / 'report.html')}"])
