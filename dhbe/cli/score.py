"""`dhbe score MODEL`: ACC and ASR on data."""

from collections.abc import Sequence

from dhbe import api
from dhbe.cli import arguments, shown, vendor
from dhbe.cli.codes import DONE
from dhbe.cli.parser import Parser


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code."""
    args = parser().parse_args(argv)
    suspect = arguments.suspect(args)
    shown.notes(args, suspect.warnings)
    evidence = arguments.evidence(args, suspect)
    assert evidence is not None
    with vendor.running(suspect.info.code):
        measures, doubts = api.score_with_doubts(suspect, evidence, device=args.device)
    shown.notes(args, doubts)
    warnings = [*suspect.warnings, *evidence.images.notes, *doubts]
    said = ", ".join(
        f"{name} {rate:.1%}" for name, rate in (("ACC", measures.acc), ("ASR", measures.asr)) if rate is not None
    )
    told = shown.envelope("score", None, said, suspect.info.sha256, None)
    content = {**told, **measures.model_dump(mode="json", exclude={"signs"}), "warnings": warnings}
    shown.show(args, content, lambda: shown.rates({"measured": measures}))
    return DONE


def parser() -> Parser:
    """The verb's options."""
    parser = Parser(
        "score",
        "  dhbe score suspect.safetensors --data digits --trigger badnets:3 --target 9\n"
        "  dhbe score vendor.pt --arch vendor.py:net --classes 10 --data test.npz --trigger trigger.npz --target 0 --json",
        description="Measures accuracy (ACC) and, with a trigger, attack success rates (ASR) of a model on data.",
    )
    arguments.add_model(parser)
    arguments.add_evidence(parser, needed=True)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    arguments.add_output(parser)
    return parser
