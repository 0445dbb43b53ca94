"""`dhbe bench list | run | show | export`: tables and figures, of the paper and others, from cases and records."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dhbe.bench import SCALES, Scale
from dhbe.bench.catalogue import NAMES, cases, find
from dhbe.bench.store import Store
from dhbe.cli import values
from dhbe.cli.codes import DONE, FAILED, FOUND
from dhbe.cli.parser import Parser
from dhbe.errors import Interrupted, Refused

RECORDS, WORK = Path("results/bench"), Path("runs/bench")


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return DONE
    if argv[0] not in DOES:
        raise Refused(f"no bench command {argv[0]!r}; available: {', '.join(DOES)} (see dhbe bench --help)")
    return DOES[argv[0]](argv[1:])


def _list_parser() -> Parser:
    parser = Parser("bench list", "  dhbe bench list --scale paper", description="Lists the experiments.")
    _scale(parser)
    return parser


def _list(argv: Sequence[str]) -> int:
    args = _list_parser().parse_args(argv)
    scale = SCALES[args.scale]
    print(f"at the scale {scale.name}: {scale.summary}\n")
    for each in find(["all"]):
        mine = each.cases(scale)
        print(f"  {each.name:12} {len(list(mine)):4} cases  {each.title}")
    return DONE


def _run_parser() -> Parser:
    parser = Parser(
        "bench run",
        "  dhbe bench run all --scale smoke --jobs 2\n  dhbe bench run table-3 --scale small --dry-run\n"
        "  dhbe bench run figure-3 --scale small --only size=3\n  dhbe bench run mine.py --scale small --on auto",
        description="Runs the cases that have no record yet; after an interruption, the same command resumes.",
    )
    _experiments(parser)
    parser.add_argument(
        "--jobs", type=values.whole, default=1, metavar="N", help="processes on this machine (default: 1)"
    )
    parser.add_argument("--on", metavar="CLUSTER", help="run on Ray (extra ray): auto, or ray://HOST:PORT")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, ...; with CUDA, jobs are assigned to the GPUs in turn"
    )
    parser.add_argument("--any-code", action="store_true", help="accept records of older code")
    parser.add_argument("--dry-run", action="store_true", help="list what would run, with the expected minutes")
    parser.add_argument("--quiet", action="store_true", help="print no progress")
    _watchers(parser)
    return parser


def _run(argv: Sequence[str]) -> int:
    args = _run_parser().parse_args(argv)
    from dhbe.bench import sweep

    store, asked = _store(args), _asked(args)
    planned = sweep.plan(asked, store, any_code=args.any_code)
    told = f"{len(planned.waiting)} of {len(planned.cases)} cases to run, about {_time(planned.minutes / args.jobs)}"
    if args.dry_run:
        for case in planned.waiting.values():
            print(f"{case.minutes:8.2f} min  {case.stem}")
        print(told)
        return DONE
    if planned.waiting:
        _say(args.quiet, told)
    from dhbe.bench.watchers import watching

    def watch(case, record, done) -> None:
        said = record.error or f"{record.seconds:.1f} s"
        _say(args.quiet, f"[{done}/{len(planned.waiting)}] {case.name}: {said}")
        seen(case, record)

    with store.held(), watching(args.tensorboard, args.mlflow) as seen:
        going = sweep.Sweep(planned, store, args.device, args.any_code, watch)
        try:
            if planned.waiting:
                with _team(args) as team:
                    going.run(team)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; finished cases are kept") from None
    failed = [case.stem for key, case in planned.cases.items() if key in going.failed]
    if failed:
        print(
            f"dhbe: {len(failed)} cases failed; their records in {store.records} say why: {failed[0]}", file=sys.stderr
        )
        return FAILED
    return DONE


def _show_parser() -> Parser:
    parser = Parser(
        "bench show",
        "  dhbe bench show table-3 --scale small\n  dhbe bench show all --scale small --to site\n  dhbe bench show --check",
        description="Draws tables and figures from records; with --check, compares pages that contain them.",
    )
    _experiments(parser, optional=True)
    parser.add_argument(
        "--form", choices=["markdown", "latex", "csv", "html"], default="markdown", help="default: markdown"
    )
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="write each table in every format, and charts as SVG, into this folder"
    )
    parser.add_argument(
        "--check", nargs="*", type=Path, metavar="PAGE",
        help="compare pages (default: README.md and docs/*.md) with the records; exit code 1 if any differs",
    )  # fmt: skip
    parser.add_argument("--update", action="store_true", help="with --check: update the pages from the records")
    return parser


def _show(argv: Sequence[str]) -> int:
    args = _show_parser().parse_args(argv)
    from dhbe.bench import pages, showing

    if args.check is not None:
        wrong = pages.check(args.check or pages.here(), args.out, update=args.update)
        for line in wrong:
            print(line, file=sys.stderr)
        return FOUND if wrong and not args.update else DONE
    if not args.names:
        raise Refused("give an experiment, all, or --check (see dhbe bench show --help)")
    store, scale = _store(args), SCALES[args.scale]
    for each in find(args.names):
        page = showing.page(each, cases(each, scale, _only(args.only)), store, scale, args.only)
        if args.to:
            showing.write(page, args.to, store)
        else:
            print(showing.text(page, args.form))
    return DONE


def _export_parser() -> Parser:
    parser = Parser(
        "bench export",
        "  dhbe bench export records.csv\n  dhbe bench export records.parquet --scale small",
        description="Writes all records of a scale into one table, one row per case: .csv, or .parquet (extra parquet).",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="output file, ending in .csv or .parquet")
    _scale(parser)
    parser.add_argument(
        "--out", type=Path, default=RECORDS, metavar="DIR", help=f"folder of the records (default: {RECORDS})"
    )
    return parser


def _export(argv: Sequence[str]) -> int:
    args = _export_parser().parse_args(argv)
    from dhbe.bench import export

    count = export.write(args.file, args.out / args.scale)
    print(f"{count} records in {args.file}")
    return DONE


DOES: dict[str, Callable[[Sequence[str]], int]] = {"list": _list, "run": _run, "show": _show, "export": _export}


def parsers() -> dict[str, Parser]:
    """Parsers by subcommand."""
    return {"list": _list_parser(), "run": _run_parser(), "show": _show_parser(), "export": _export_parser()}


def _overview() -> str:
    return "\n".join(
        [
            "usage: dhbe bench list | run | show | export ... (see dhbe bench run --help)",
            "",
            "  list    list the experiments",
            "  run     run the cases of experiments that have no record yet",
            "  show    draw their tables and figures, or check the pages that contain them",
            "  export  write all records into one table",
            "",
            f"experiments: all, {', '.join(NAMES)}, or your own FILE.py",
            "scales:",
            *(f"  {scale.name:6} {scale.summary}" for scale in SCALES.values()),
            "",
            "examples:",
            "  dhbe bench run table-3 --scale small --jobs 2",
            "  dhbe bench show table-3 --scale small",
        ]
    )


def _scale(parser: Parser) -> None:
    parser.add_argument("--scale", choices=list(SCALES), default="smoke", help="default: smoke")


def _experiments(parser: Parser, *, optional: bool = False) -> None:
    parser.add_argument("names", nargs="*" if optional else "+", metavar="EXPERIMENT", help="by name, all, or FILE.py")
    _scale(parser)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="LABEL=VALUE",
        help="only cases with these labels, such as defense=dhbe size=3",
    )
    parser.add_argument(
        "--out", type=Path, default=RECORDS, metavar="DIR", help=f"folder of records (default: {RECORDS})"
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, metavar="DIR", help=f"folder of weights that cases share (default: {WORK})"
    )


def _watchers(parser: Parser) -> None:
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="log each case for TensorBoard (extra tensorboard)"
    )
    parser.add_argument("--mlflow", metavar="URI", help="log each case as an MLflow run (extra mlflow)")


def _store(args) -> Store:
    return Store(args.out / args.scale, args.work / args.scale)


def _asked(args) -> list:
    scale: Scale = SCALES[args.scale]
    asked = [case for each in find(args.names) for case in cases(each, scale, _only(args.only))]
    if not asked:
        raise Refused(
            f"no case has the labels {' '.join(args.only)}: dhbe bench run {args.names[0]} --dry-run lists them"
        )
    return asked


def _only(given: Sequence[str]) -> dict[str, list[str]]:
    only: dict[str, list[str]] = {}
    for each in given:
        label, equals, value = each.partition("=")
        if not equals:
            raise Refused(f"--only {each}: give LABEL=VALUE, such as defense=dhbe")
        only.setdefault(label, []).append(value)
    return only


def _team(args):
    if args.on:
        from dhbe.bench.on_ray import Cluster

        return Cluster(args.on)
    from dhbe.bench.crew import Crew

    return Crew(args.jobs)


def _time(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)
