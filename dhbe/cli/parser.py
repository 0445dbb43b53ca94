"""The parser of a verb's arguments."""

import argparse
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

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message} (see {self.prog} --help)")
