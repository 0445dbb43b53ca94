"""Tables that pages show between two marks, and whether they are those that the records give.

`<!-- table: bench table-3 small -->` is an experiment at a scale; `<!-- table: timings/speed.py -->` is what the
function `tables` of that module of a clone gives under this name.
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
    """The pages of this folder that show tables.

    Raises:
        Refused: There are none.
    """
    found = [path for path in (Path("README.md"), *sorted(Path("docs").rglob("*.md"))) if path.is_file()]
    if not found:
        raise Refused("there is no README.md here: run this in a clone, or name the pages")
    return found


def check(pages: Sequence[Path], records: Path, *, update: bool = False) -> list[str]:
    """What pages show otherwise than the records give, a line each.

    Args:
        pages: Markdown files.
        records: Folder of the scales' records.
        update: Put what the records give in its place.

    Raises:
        Refused: A page cannot be read, or a mark names nothing.
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
                wrong.append(f"{page}: `{name}` shows another table than its records give (--update mends it)")
                text = text.replace(f"{BEGIN}{name} -->\n{shown}\n{END}", f"{BEGIN}{name} -->\n{made}\n{END}")
        if update:
            files.write(page, text)
    return wrong


def names(text: str) -> list[str]:
    """The marks of a page."""
    return [part.partition(" -->")[0] for part in text.split(BEGIN)[1:]]


def between(text: str, name: str) -> str:
    """What a page shows as the table of this name."""
    return text.partition(f"{BEGIN}{name} -->")[2].partition(END)[0].strip()


def drawn(name: str, records: Path) -> str:
    """The table of a mark, from records.

    Raises:
        Refused: The mark names nothing.
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
    """Heads and rows as a page has them."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))
