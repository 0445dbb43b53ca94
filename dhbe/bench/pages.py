"""Checks and updates tables between marks in Markdown pages against the records.

`<!-- table: bench table-3 small -->` marks an experiment at a scale; `<!-- table: timings/speed.py -->` what the function
`tables` of that module in a clone returns under this name.
"""

import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

from dhbe import files
from dhbe.bench import showing
from dhbe.bench.catalogue import find
from dhbe.bench.scales import SCALES
from dhbe.bench.store import Store
from dhbe.errors import Refused

BEGIN, END = "<!-- table: ", "<!-- end of table -->"


def here() -> list[Path]:
    """README.md and docs/**/*.md below the working directory.

    Raises:
        Refused: There are none.
    """
    found = [path for path in (Path("README.md"), *sorted(Path("docs").rglob("*.md"))) if path.is_file()]
    if not found:
        raise Refused("there is no README.md here: run this in a clone, or give the pages")
    return found


def check(pages: Sequence[Path], records: Path, *, update: bool = False) -> list[str]:
    """Compares the tables of pages with the records; returns one line for each difference.

    Args:
        pages: Markdown files.
        records: Folder with the records of all scales.
        update: Replace tables that differ.

    Raises:
        Refused: A page cannot be read, or a mark names no table.
    """
    wrong = []
    for page in pages:
        try:
            text = page.read_text()
        except OSError as error:
            raise Refused(f"cannot read {page}: {(error.strerror or 'failed').lower()}") from error
        for name in names(text):
            made, shown = drawn(name, records), between(text, name)
            if made != shown:
                wrong.append(f"{page}: the table `{name}` differs from its records (--update replaces it)")
                text = text.replace(f"{BEGIN}{name} -->\n{shown}\n{END}", f"{BEGIN}{name} -->\n{made}\n{END}")
        if update:
            files.write(page, text)
    return wrong


def names(text: str) -> list[str]:
    """The names in the marks of a page."""
    return [part.partition(" -->")[0] for part in text.split(BEGIN)[1:]]


def between(text: str, name: str) -> str:
    """A page's table with this name."""
    return text.partition(f"{BEGIN}{name} -->")[2].partition(END)[0].strip()


def drawn(name: str, records: Path) -> str:
    """The table of a mark, drawn from records.

    Raises:
        Refused: The mark names no table.
    """
    kind, *rest = name.split()
    if kind == "bench" and len(rest) >= 2 and rest[1] in SCALES:
        (experiment,), scale, only = find(rest[:1]), SCALES[rest[1]], rest[2:]
        from dhbe.bench.catalogue import cases

        wanted: dict[str, list[str]] = {}
        for each in only:
            label, _, value = each.partition("=")
            wanted.setdefault(label, []).append(value)
        mine = cases(experiment, scale, wanted)
        return showing.table(showing.page(experiment, mine, Store(records / scale.name, Path()), scale, only))
    if kind.endswith(".py") and Path(kind).is_file():
        if "" not in sys.path:
            sys.path.insert(0, "")
        tables = import_module(kind.removesuffix(".py").replace("/", ".")).tables()
        if name in tables:
            return tables[name]
    raise Refused(f"no table is called {name!r}: give `bench EXPERIMENT SCALE`, or the module of a clone that draws it")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))
