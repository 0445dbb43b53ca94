"""Tables that pages show between two marks, drawn from records by the module that the first mark names."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
END = "<!-- end of table -->"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Heads and rows as a page has them."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


def shown(page: str, name: str) -> str:
    """What the page at this path, from the project's root, shows as the table of this name."""
    return (ROOT / page).read_text().partition(f"<!-- table: {name} -->")[2].partition(END)[0].strip()


def tell(page: str, made: dict[str, str]) -> None:
    """Prints tables by their names; with --check on the command line, fails if the page shows others."""
    if "--check" not in sys.argv:
        print("\n\n".join(made.values()))
    elif wrong := [name for name, rows in made.items() if shown(page, name) != rows]:
        sys.exit(f"{page} shows other tables than the records give: run {command(wrong[0])}")


def command(name: str) -> str:
    """What draws the table of this name.

    >>> command("experiments/sweep.py parts")
    'python -m experiments.sweep'
    """
    return f"python -m {name.split('.py')[0].replace('/', '.')}"
