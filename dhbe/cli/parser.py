"""The parser of a verb's arguments."""

import argparse
import shlex
from typing import Any, NoReturn

from dhbe.errors import Refused


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, verb: str = "", examples: str = "", **more: Any) -> None:
        super().__init__(
            prog=f"dhbe {verb}".strip(),
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The options that were given, and as `command` the whole command line."""
        found = super().parse_args(args, namespace)
        found.command = shlex.join([*self.prog.split(), *args])
        return found

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message} (see {self.prog} --help)")
