"""The argument parser of a verb."""

import argparse
import difflib
import shlex
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dhbe import foreign
from dhbe.errors import Refused


class _Help(argparse.RawDescriptionHelpFormatter):
    """A formatter whose usage names only what must be given, as the whole of it would fill a screen; examples keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text if "\n" in text else argparse.HelpFormatter._fill_text.__get__(self)
        return fill(text, width, indent)

    def add_usage(self, usage: Any, actions: Iterable[argparse.Action], groups: Any, prefix: Any = None) -> None:
        needed = [action for action in actions if action.required]
        needed.sort(key=lambda action: bool(action.option_strings))
        words = [
            f"{' '.join(action.option_strings)} {action.metavar or action.dest.upper()}".strip() for action in needed
        ]
        super().add_usage(usage or " ".join(["%(prog)s", *words, "[options]"]), [], [], prefix)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, verb: str = "", examples: str = "", **more: Any) -> None:
        super().__init__(
            prog=f"dhbe {verb}".strip(),
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=_Help,
            allow_abbrev=False,
            **more,
        )
        if verb:
            self.add_argument(
                "--config",
                metavar="FILE",
                help="read options as KEY = VALUE from a TOML file; the command line takes precedence",
            )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The parsed options, with the whole command line as `command`."""
        found = super().parse_args(args, namespace)
        found.command = shlex.join([*self.prog.split(), *args])
        return found

    def error(self, message: str) -> NoReturn:
        unknown, _, words = message.partition("unrecognized arguments: ")
        wrong = (
            next((word.partition("=")[0] for word in words.split() if word.startswith("--")), "") if not unknown else ""
        )
        raise Refused(f"{message}{meant(wrong, self._option_string_actions)} (see {self.prog} --help)")


def meant(word: str, known: Iterable[str]) -> str:
    """A suggestion of the known word that was probably meant, or an empty text.

    >>> meant("--itertions", ["--iterations", "--lr"]), meant("scam", ["erase", "scan"]), meant("x", ["erase"])
    (' (did you mean --iterations?)', ' (did you mean scan?)', '')
    """
    near = difflib.get_close_matches(word, list(known), n=1) if word else []
    return f" (did you mean {near[0]}?)" if near else ""


def configured(words: Sequence[str]) -> list[str]:
    """The options of a command, completed with those of its `--config FILE`; the command's take precedence.

    The file is TOML: `iterations = 40`, `mean = [0.5, 0.5, 0.5]`, `quiet = true`, `model = "vendor.pt"`.

    Raises:
        Refused: The file cannot be read, or is not TOML with plain values only.
    """
    if "--config" not in words:
        return list(words)
    place = list(words).index("--config")
    if place + 1 == len(words):
        raise Refused("--config needs a file")
    path, rest = Path(words[place + 1]), [*words[:place], *words[place + 2 :]]
    try:
        told = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"cannot read --config {foreign.name(path)}: {foreign.line(error)}; it must be TOML") from error
    given = {word.partition("=")[0].removeprefix("--no-").removeprefix("--") for word in rest if word.startswith("--")}
    more: list[str] = []
    for key, value in told.items():
        name = key.replace("_", "-")
        if isinstance(value, dict):
            raise Refused(f"--config {foreign.name(path)}: [{key}] is a table; give options as plain KEY = VALUE")
        if key == "model":
            rest.insert(0, str(value))
        elif name not in given:
            many = value if isinstance(value, list) else [value]
            more += (
                [f"--{name}" if value else f"--no-{name}"]
                if isinstance(value, bool)
                else [f"--{name}", *map(str, many)]
            )
    return [*rest, *more]
