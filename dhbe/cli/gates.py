"""Gates: limits on a cleaned model's ACC and ASR that determine the exit code."""

import argparse

from dhbe.api import Evidence
from dhbe.cli import codes, shown, values
from dhbe.cli.codes import FOUND
from dhbe.cli.parser import Parser
from dhbe.errors import Refused
from dhbe.records import Record

WORDS = {"still answers": "still answers a trigger", "damaged": "is damaged"}
"""How messages put a bad verdict on the cleaned model."""


def add_fail_on(parser: Parser) -> None:
    """Adds the option that selects which verdicts fail."""
    parser.add_argument(
        "--fail-on", choices=["unclear", "found"], default="unclear",
        help="what the exit code reports: unclear (default): 1 if a backdoor was found or remains, 3 if that is unclear; found: "
        "1 likewise, but 0 if that is unclear",
    )  # fmt: skip


def add(parser: Parser) -> None:
    """Adds the options of the gates."""
    add_fail_on(parser)
    for name, which in (("--max-asr", "ASR is above"), ("--min-acc", "ACC is below")):
        parser.add_argument(
            name, type=values.fraction, metavar="F", help=f"exit code 1 if the cleaned model's {which} F (0..1)"
        )


def check(args: argparse.Namespace, evidence: Evidence | None) -> None:
    """Raises `Refused` if a gate needs a rate that will not be measured."""
    if args.max_asr is not None and (evidence is None or evidence.trigger is None):
        raise Refused("--max-asr needs --data, --trigger and --target")
    if args.min_acc is not None and evidence is None:
        raise Refused("--min-acc needs --data")


def passed(args: argparse.Namespace, record: Record) -> int:
    """The exit code by the run's verdict and then by the gates."""
    if record.verdict in WORDS:
        return shown.said(
            f"by the run's own verdict, the cleaned model {WORDS[record.verdict]}; it was written anyway", FOUND
        )
    after = record.after
    assert after is not None
    if args.max_asr is not None and after.asr is None:
        return shown.said("gate failed: no ASR, as the cleaned model classifies no image correctly", FOUND)
    if args.max_asr is not None and after.asr > args.max_asr:
        return shown.said(f"gate failed: ASR {after.asr:.4f} is above --max-asr {args.max_asr:g}", FOUND)
    if args.min_acc is not None and (after.acc is None or after.acc < args.min_acc):
        return shown.said(f"gate failed: ACC {after.acc:.4f} is below --min-acc {args.min_acc:g}", FOUND)
    return codes.of(record.verdict, args.fail_on)
