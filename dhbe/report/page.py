"""A record as one self-contained HTML page, without scripts or external resources and safe from injection."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jinja2
from markupsafe import escape

from dhbe.records import Box, Measures, ModelInfo, Record
from dhbe.report.charts import boxplot, chart
from dhbe.report.names import ACTIVATIONS, CURVES, PICTURES, SIGNS, meaning, placed
from dhbe.report.verdicts import RATES, Rate, Verdict, erased, line, searched, strongest_form, verdict
from dhbe.report.words import duration, moment, percent, setting


def render(record: Record, pictures: Mapping[str, bytes] = MappingProxyType({})) -> str:
    """Renders the report of a run from its record; equal records give equal pages.

    Args:
        record: The record. Every text in it is escaped.
        pictures: PNG files by name; those in `PICTURES` have captions.

    Returns:
        The HTML page.
    """
    states = [measures for measures in (record.before, record.after) if measures is not None] or [Measures()]
    signs = placed([state.signs for state in states])
    rates = [(name, note, [Rate.of(state, field) for state in states]) for field, name, note in RATES]
    return _template().render(
        record=record,
        verdict=_verdict(record, states),
        heads=_heads(record, states),
        rates=rates,
        measured=any(rate.value is not None for _, _, pair in rates for rate in pair),
        strongest=strongest_form(record.battery) if record.battery else None,
        signs=[
            (name, meaning(SIGNS, name, record.families), [each.get(name) for each in signs])
            for name in dict.fromkeys(name for each in signs for name in each)
        ],
        moved=[
            (name, note, boxplot(boxes))
            for name, note in ACTIVATIONS.items()
            if (boxes := _boxes(record, states, name))
        ],
        curves=[(name, meaning(CURVES, name, record.families), chart(points)) for name, points in series(record.curve)],
        strongest_picture=next(
            (base64.b64encode(pictures[name]).decode() for name in ("found", "trigger") if name in pictures), None
        ),
        pictures=[(name, PICTURES.get(name), base64.b64encode(png).decode()) for name, png in pictures.items()],
    )


def framed(record: Record, pictures: Mapping[str, bytes] = MappingProxyType({})) -> str:
    """The page in a frame for notebooks, so that its styles do not affect them."""
    return (
        f'<iframe sandbox srcdoc="{escape(render(record, pictures))}" '
        'style="width: 100%; height: 40rem; border: 0" title="dhbe report"></iframe>'
    )


def _verdict(record: Record, states: Sequence[Measures]) -> Verdict:
    if record.verdict is None:
        return verdict(record.kind, states)
    return erased(record) if record.kind == "erase" else searched(record)


def compared(model: ModelInfo, records: Mapping[str, Record]) -> str:
    """One page that compares several defences on one model.

    Args:
        model: The suspect model.
        records: Record of each run by the defence's name.
    """
    rows = []
    for name, record in records.items():
        judged = _verdict(record, [record.before or Measures(), record.after or Measures()])
        rows.append((name, record, judged.tone, judged.headline, line(record)))
    heads = ("ACC before", "ACC after", "ASR before", "ASR after", "ASR ×9 after")
    return _template("compare.html").render(title=model.path or model.arch, rows=rows, heads=heads)


def _template(name: str = "report.html") -> jinja2.Template:
    folder = jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates")
    page = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters |= {
        "duration": duration,
        "percent": percent,
        "moment": moment,
        "setting": setting,
        "rate": lambda value: Rate(value, None),
    }
    return page.get_template(name)


def _heads(record: Record, states: Sequence[Measures]) -> list[str]:
    if len(states) == 2:
        return ["Before", "After"] if record.kind == "verify" else ["Suspect", "Cleaned"]
    return ["Measured"]


def _boxes(record: Record, states: Sequence[Measures], name: str) -> dict[str, Box]:
    """The activation differences with a name, by column head."""
    pairs = zip(_heads(record, states), states, strict=True)
    return {head: state.activations[name] for head, state in pairs if name in state.activations}


def series(curve: list[dict[str, float]]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """The quantities of a curve in order of appearance, each with its points (iteration, value)."""
    names = dict.fromkeys(name for point in curve for name in point if name != "iteration")
    for name in names:
        yield name, [(point["iteration"], point[name]) for point in curve if name in point]
