"""`dhbe completion SHELL`: prints a shell script that completes verbs, options, their choices and files."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import shtab

from dhbe.cli.codes import DONE
from dhbe.cli.entry import VERBS
from dhbe.cli.parser import Parser


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code."""
    args = parser().parse_args(argv)
    print(shtab.complete(_whole(), args.shell))
    return DONE


def parser() -> Parser:
    """The verb's options."""
    parser = Parser(
        "completion",
        "  dhbe completion bash > ~/.local/share/bash-completion/completions/dhbe\n"
        "  dhbe completion zsh > ~/.zfunc/_dhbe      # with ~/.zfunc in $fpath",
        description="Prints a shell script that completes verbs, options, their choices and files.",
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="shell that the script is for")
    return parser


def _whole() -> argparse.ArgumentParser:
    """One parser for all verbs."""
    whole = argparse.ArgumentParser("dhbe")
    verbs = whole.add_subparsers()
    for verb, what in VERBS.items():
        module = import_module(f"dhbe.cli.{verb}")
        single = [_completed(module.parser())] if hasattr(module, "parser") else []
        each = {} if single else module.parsers()
        parser = verbs.add_parser(verb, help=what, parents=single, add_help=not single)
        if each:
            behind = parser.add_subparsers()
            for name, inner in each.items():
                behind.add_parser(name, help=inner.description, parents=[_completed(inner)], add_help=False)
    return whole


def _completed(parser: Parser) -> Parser:
    """Marks the arguments of a parser that are files or folders, and returns the parser."""
    for action in parser._actions:
        if action.type is Path or action.dest == "config":
            place = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE
            setattr(action, "complete", place)  # noqa: B010 (shtab's interface, unknown to the stubs of argparse)
    return parser
