"""Output of experiments as text and files: tables, charts, and the origin of the numbers."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dhbe import files
from dhbe.bench import rendering
from dhbe.bench.cases import Case
from dhbe.bench.drawing import Drawn, Result
from dhbe.bench.experiment import Experiment
from dhbe.bench.scales import Scale
from dhbe.bench.store import CaseRecord, Store


@dataclass(frozen=True)
class Page:
    """An experiment at a scale, drawn."""

    name: str
    title: str
    note: str
    drawn: Sequence[Drawn]
    told: str
    """Scale, seeds, devices, dates and commits of the records."""
    command: str
    """The command that makes the records."""


def page(
    experiment: Experiment,
    cases: Sequence[Case],
    store: Store,
    scale: Scale,
    only: Sequence[str] | Mapping[str, object] = (),
) -> Page:
    """Draws an experiment from the existing records."""
    results = []
    for case in cases:
        record = store.read(case)
        if record:
            results.append(Result(case.labels, record, case.stem))
    name = str(experiment.file or experiment.name)
    chosen = f" --only {' '.join(map(str, only))}" if only else ""
    command = f"dhbe bench run {name} --scale {scale.name}{chosen}"
    drawn = [draw(results) for draw in experiment.draw] if results else []
    return Page(
        experiment.name, experiment.title, experiment.note, drawn, provenance(results, len(cases), scale), command
    )


def provenance(results: Sequence[Result], asked: int, scale: Scale) -> str:
    """The origin of the numbers in one line."""
    if not results:
        return f"Scale {scale.name}: no records yet."
    records = [each.record for each in results]
    good = [each for each in records if not each.error] or records
    seeds = sorted({each.settings["seed"] for each in good if each.work == "erase"})
    days = sorted({each.finished[:10] for each in good})
    commits = sorted({commit(each) for each in good})
    failed = sum(each.error is not None for each in records)
    parts = [
        f"Scale {scale.name}, {len(good)} of {asked} cases",
        *([f"{failed} failed"] if failed else []),
        *([f"seeds {', '.join(map(str, seeds))}"] if seeds else []),
        " and ".join(sorted({each.device for each in good if each.device})),
        days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
        f"commit {', '.join(commits)}" if any(commits) else f"dhbe {good[0].versions.get('dhbe', '')}",
    ]
    return "; ".join(part for part in parts if part) + "."


def commit(record: CaseRecord) -> str:
    """The commit with which a record was made, if it was run from a clone."""
    return record.versions.get("commit", "")


def text(page: Page, form: str) -> str:
    """A page in one format, for printing."""
    render = rendering.FORMS[form]
    comment = {"latex": "% ", "csv": "# ", "html": "", "markdown": ""}[form]
    lines = [page.title, *([page.note] if page.note else []), page.told, page.command]
    if form == "html":
        head = [f"<h2>{html.escape(page.title)}</h2>", *(f"<p>{html.escape(line)}</p>" for line in lines[1:])]
    elif form == "markdown":
        head = [f"## {page.title}", "", *(f"{line}\n" for line in lines[1:-1]), f"`{page.command}`", ""]
    else:
        head = [f"{comment}{line}" for line in lines]
    return "\n".join([*head, *(f"{render(each.table)}\n" for each in page.drawn)])


def table(page: Page) -> str:
    """A page's tables with the origin of the numbers, for other pages' marks."""
    return "\n\n".join([*(rendering.markdown(each.table) for each in page.drawn), f"{page.told} `{page.command}`"])


def write(page: Page, folder: Path, store: Store) -> list[Path]:
    """Writes a page in every format, with its charts and pictures; returns the files written.

    Raises:
        Failed: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ends = {"markdown": "md", "latex": "tex", "csv": "csv", "html": "html"}
    written = []

    def keep(name: str, content: str | bytes) -> str:
        files.write(folder / name, content)
        written.append(folder / name)
        return name

    charts = [
        (keep(f"{page.name}-{number}.svg", rendering.svg(each)), each.table.title or page.title)
        for number, each in enumerate(page.drawn, 1)
        if any(panel.lines or panel.boxes for panel in each.panels)
    ]
    pictures = [
        (keep(file, (store.records / file).read_bytes()), what) for each in page.drawn for what, file in each.pictures
    ]
    for form, end in ends.items():
        content = text(page, form)
        if form == "markdown":
            content += "".join(f"\n![{what}]({file})\n" for file, what in [*charts, *pictures])
        elif form == "html":
            content += "".join(
                f'\n<figure><img src="{html.escape(file)}" alt="{html.escape(what)}"><figcaption>{html.escape(what)}'
                "</figcaption></figure>\n"
                for file, what in [*charts, *pictures]
            )
        keep(f"{page.name}.{end}", content + "\n")
    return written
