"""`dhbe resume DIR`: resumes the run in a folder, with the command line stored in its state."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dhbe import foreign, records, runs, state_file, suspects
from dhbe.cli.parser import Parser
from dhbe.errors import Refused

GOES_ON = ("erase", "defend", "attack", "scan", "verify", "demo")
"""Verbs whose runs save their state."""

EARLIER = ("--overwrite", "--resume")
"""Options about an earlier run."""


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code of the resumed command."""
    args = parser().parse_args(argv)
    words = again(args.folder)
    print(f"dhbe {shlex.join(words)}", file=sys.stderr)
    from dhbe.cli.entry import main

    return main(words)


def parser() -> Parser:
    """The verb's options."""
    parser = Parser(
        "resume",
        "  dhbe resume runs/vendor",
        description="Resumes an interrupted erase, scan, verify, defend, attack or demo with the options it was started with.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the run, which holds its state")
    return parser


def again(folder: Path) -> list[str]:
    """The arguments of `dhbe` that resume the run in a folder.

    Raises:
        Refused: There is no run, it is finished, or resuming would run code that is named in the state only.
    """
    words = _command(folder)
    if words[:2] == ["dhbe", "compare"]:
        whole = [*(word for word in words if word not in EARLIER), "--resume"]
        raise Refused(f"{foreign.name(folder)} is part of a comparison; to resume that: {shlex.join(whole)}")
    if words[:1] != ["dhbe"] or words[1:2] == [] or words[1] not in GOES_ON:
        raise Refused(f"the state in {foreign.name(folder)} lacks its command: give it again, with --resume")
    rest = [word for word in words[1:] if word not in EARLIER]
    rest += ["--resume"] if "--out" in rest else ["--out", str(folder), "--resume"]
    for option, value in zip(rest, [*rest[1:], ""], strict=True):
        named = value if option == "--arch" else option.removeprefix("--arch=") if option.startswith("--arch=") else ""
        if suspects.vendor_code(named):
            raise Refused(f"this would run code that the folder names; if you trust it, run: dhbe {shlex.join(rest)}")
    return rest


def _command(folder: Path) -> list[str]:
    """The words of the command whose run was interrupted; none if its state lacks them."""
    planted = folder / runs.PLANTED  # of a demo, whose first half is a run of its own
    state = next((each for each in (folder, planted) if os.path.lexists(each / runs.CHECKPOINT)), None)
    command = state_file.read(state / runs.CHECKPOINT).get("command") if state else None
    if state is None and (folder / runs.RECORD).exists():
        told = records.read(folder / runs.RECORD).command
        raise Refused(f"the run in {foreign.name(folder)} is finished{f'; it was: {told}' if told else ''}")
    if state is None and (planted / runs.RECORD).exists():
        command = records.read(planted / runs.RECORD).command
    elif state is None:
        raise Refused(
            f"{foreign.name(folder)} holds no interrupted run; score saves no state, and compare goes on with --resume"
        )
    return shlex.split(command) if isinstance(command, str) else []
