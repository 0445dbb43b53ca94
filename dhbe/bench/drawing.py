"""The content of tables and figures, from results and their labels, independent of rendering."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from dhbe.bench.cases import Labels
from dhbe.bench.store import CaseRecord
from dhbe.records import Measures

Paper = Mapping[tuple, Sequence[float | None]]
"""The paper's numbers by the labels of a row and, if there are columns, of its column."""

NAMES = {
    "acc": "ACC %", "asr": "ASR %", "asr_x4": "ASR x4 %", "asr_x9": "ASR x9 %", "lost": "ACC lost", "seconds": "seconds",
    "features_l1": "activation difference (L1)", "features_l2": "activation difference (L2)",
    "logits_l1": "output difference (L1)", "logits_l2": "output difference (L2)",
    "anomaly_index": "index", "suspected_class": "class found", "mib": "MiB",
}  # fmt: skip
"""Display names of measures in table heads and on axes."""
RATES = ("acc", "asr", "asr_x4", "asr_x9", "asr_victim", "asr_all", "ra")


@dataclass(frozen=True)
class Result:
    """A case's labels and its record."""

    labels: Labels
    record: CaseRecord
    stem: str
    """Stem of its file names."""

    def measures(self) -> Measures | None:
        """Measures of the cleaned model, or of the one that was planted, scanned or scored."""
        record = self.record.record
        return record and (record.after or record.before)

    def value(self, name: str) -> float | None:
        """A value by name, rates in percent; None if it was not measured."""
        if name in self.record.found:
            return self.record.found[name]
        record, measures = self.record.record, self.measures()
        if record is None or measures is None:
            return None
        if name == "seconds":
            return record.seconds
        if name == "mib":
            return None if record.memory is None else record.memory / 2**20
        if name == "lost":
            rates = [each and each.acc for each in (record.before, record.after)]
            return 100 * (rates[0] - rates[1]) if rates[0] is not None and rates[1] is not None else None
        if name in measures.activations:
            return measures.activations[name][2]
        if name in measures.signs:
            return measures.signs[name]
        rate = getattr(measures, name) if name in RATES else None
        return None if rate is None else 100 * rate


@dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Point:
    """A mean over seeds, with its deviation."""

    x: float
    y: float
    spread: float = 0.0


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    joined: bool = True
    """Whether points are joined; otherwise a logistic curve is fitted to them."""
    boxes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Lower whisker, quartiles and upper whisker by name, instead of lines."""


@dataclass(frozen=True)
class Drawn:
    """The output of an experiment: a table, and optionally charts and pictures."""

    table: Table
    panels: Sequence[Panel] = ()
    pictures: Sequence[tuple[str, str]] = ()
    """Caption of each picture, and its file beside the records."""


@dataclass(frozen=True)
class Grid:
    """A table with a row for each value of some labels, a column for each value of another, and means over the rest."""

    rows: Sequence[str]
    values: Sequence[str]
    columns: str = ""
    """The label whose values are the columns; if empty, each of `values` is a column."""
    paper: Paper = field(default_factory=dict)
    title: str = ""
    mean: bool = False
    """Whether to add a last row with the means of the columns; the paper's are over the same rows."""

    def __call__(self, results: Sequence[Result]) -> Drawn:
        kinds = _distinct(tuple(each.labels.get(row, "") for row in self.rows) for each in results)
        across = _distinct(each.labels[self.columns] for each in results) if self.columns else []
        rows = []
        for kind in kinds:
            mine = [each for each in results if tuple(each.labels.get(row, "") for row in self.rows) == kind]
            cells = [str(part) for part in kind]
            if self.columns:
                for column in across:
                    here = [each for each in mine if each.labels[self.columns] == column]
                    cells.append(cell(here, self.values, self.paper.get((*kind, column))))
            else:
                told = self.paper.get(kind) or [None] * len(self.values)
                cells += [
                    cell(mine, [value], None if figure is None else [figure])
                    for value, figure in zip(self.values, told, strict=False)
                ]
            rows.append(cells)
        if self.mean and len(kinds) > 1:
            rows.append(
                ["mean", *[""] * (len(self.rows) - 1), *(self._mean(results, kinds, column) for column in across)]
            )
        named = [NAMES.get(value, value.replace("_", " ")) for value in self.values]
        heads = [f"{column}: {' / '.join(named)}" for column in across] if self.columns else named
        title = self.title + (" In brackets: the paper's." if self.paper else "")
        return Drawn(Table(title.strip(), [*self.rows, *heads], rows))

    def _mean(self, results: Sequence[Result], kinds: Sequence[tuple], column: Any) -> str:
        """The mean of a column, over rows, of the means over seeds."""
        here = [each for each in results if each.labels[self.columns] == column]
        means = []
        for value in self.values:
            each_row = [
                _known(one.value(value) for one in here if tuple(one.labels.get(row, "") for row in self.rows) == kind)
                for kind in kinds
            ]
            means.append([statistics.mean(values) for values in each_row if values])
        told = [self.paper[(*kind, column)] for kind in kinds if (*kind, column) in self.paper]
        ours = " / ".join(spread([statistics.mean(each)]) if each else "—" for each in means)
        paper = " / ".join(f"{statistics.mean(_known(figures)):.2f}" for figures in zip(*told, strict=True))
        return f"{ours} ({paper})" if paper else ours


@dataclass(frozen=True)
class Curves:
    """A line chart of a measure over a label or another measure, with a line for each value of some labels."""

    x: str
    """A label whose values are numbers, or a measure."""
    y: Sequence[str]
    """Measures, each in its own panel."""
    lines: Sequence[str] = ()
    """The labels whose values make the lines."""
    panels: str = ""
    """The label whose values make further panels."""
    fitted: bool = False
    """Whether to fit a logistic curve to the points, which are then not averaged."""
    title: str = ""
    paper: Paper = field(default_factory=dict)
    """The paper's numbers by panel, line and x, as far as these exist; one for each measure of `y`."""

    def __call__(self, results: Sequence[Result]) -> Drawn:
        panels, rows = [], []
        for there, measure in product(_distinct(each.labels.get(self.panels, "") for each in results), self.y):
            lines: dict[str, list[Point]] = {}
            inside = [each for each in results if each.labels.get(self.panels, "") == there]
            for line in _distinct(tuple(each.labels[name] for name in self.lines) for each in inside):
                mine = [each for each in inside if tuple(each.labels[name] for name in self.lines) == line]
                lines[", ".join(map(str, line)) or "ours"] = list(self._points(mine, measure))
            told = f"{self.panels} {there}" if self.panels else ""
            panels.append(Panel(told, NAMES.get(self.x, self.x), NAMES.get(measure, measure), lines, not self.fitted))
        place = tuple(name for name in (self.panels, *self.lines) if name)
        over = () if self.fitted and self.x in NAMES else (self.x,)
        for kind in _distinct(tuple(each.labels.get(name, "") for name in (*place, *over)) for each in results):
            mine = [each for each in results if tuple(each.labels.get(n, "") for n in (*place, *over)) == kind]
            told = self.paper.get(kind) or [None] * len(self.y)
            shown = (self.x, *self.y) if not over else self.y
            figures = told if over else [None, *told]
            rows.append(
                [
                    *map(str, kind),
                    *(cell(mine, [value], _one(figure)) for value, figure in zip(shown, figures, strict=False)),
                ]
            )
        named = [NAMES.get(value, value) for value in ((self.x, *self.y) if not over else self.y)]
        title = self.title + (" In brackets: the paper's." if self.paper else "")
        return Drawn(Table(title.strip(), [*place, *over, *named], rows), panels)

    def _points(self, results: Sequence[Result], measure: str) -> Iterator[Point]:
        if self.fitted:
            for each in results:
                x, y = _at(each, self.x), each.value(measure)
                if x is not None and y is not None:
                    yield Point(x, y)
            return
        for x in sorted({_at(each, self.x) or 0.0 for each in results}):
            values = _known(each.value(measure) for each in results if (_at(each, self.x) or 0.0) == x)
            if values:
                yield Point(x, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


@dataclass(frozen=True)
class Boxes:
    """Box plots of activation differences, with a panel for each measure and a box for each value of a label."""

    measures: Sequence[str]
    label: str
    title: str = ""

    def __call__(self, results: Sequence[Result]) -> Drawn:
        panels, rows = [], []
        for measure in self.measures:
            boxes = {}
            for name in _distinct(each.labels[self.label] for each in results):
                mine = [each.measures() for each in results if each.labels[self.label] == name]
                found = [each.activations[measure] for each in mine if each and measure in each.activations]
                if found:
                    boxes[str(name)] = [statistics.mean(box[part] for box in found) for part in range(5)]
                    rows.append([NAMES[measure], str(name), *(f"{x:.2f}" for x in boxes[str(name)])])
            panels.append(Panel(NAMES[measure], "", "", boxes=boxes))
        heads = ["measure", self.label, "lower whisker", "first quartile", "median", "third quartile", "upper whisker"]
        return Drawn(Table(self.title, heads, rows), panels)


@dataclass(frozen=True)
class Pictures:
    """Images that cases saved beside their records, captioned with a label."""

    label: str
    title: str = ""

    def __call__(self, results: Sequence[Result]) -> Drawn:
        shown = [
            (f"{each.labels[self.label]}, {name.rpartition('.')[0]}", f"{each.stem}.{name}")
            for each in results
            for name in each.record.pictures
        ]
        rows = [[what, file] for what, file in shown]
        return Drawn(Table(self.title, ["picture", "file"], rows), pictures=shown)


def cell(results: Sequence[Result], values: Sequence[str], paper: Sequence[float | None] | None = None) -> str:
    """Mean and deviation of each value, and the paper's in brackets; "failed" if all cases failed.

    >>> cell([], ["acc"])
    '—'
    """
    if results and all(each.record.error for each in results):
        ours = "failed"
    else:
        ours = " / ".join(spread(_known(each.value(value) for each in results)) for value in values)
        ours = "—" if set(ours) <= set("— /") else ours
    figures = ["—" if x is None else f"{x:g}" for x in paper or ()]
    return f"{ours} ({' / '.join(figures)})" if any(x != "—" for x in figures) else ours


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation.

    >>> spread([]), spread([1.0]), spread([1.0, 2.0]), spread([300.0])
    ('—', '1.0', '1.5 ± 0.7', '300')
    """
    if not values:
        return "—"
    mean = statistics.mean(values)
    digits = 0 if abs(mean) >= 200 else 1
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{deviation}"


def _at(result: Result, x: str) -> float | None:
    return float(result.labels[x]) if x in result.labels else result.value(x)


def _one(figure: float | None) -> list[float] | None:
    return None if figure is None else [figure]


def _known(values: Iterable[float | None]) -> list[float]:
    return [float(x) for x in values if x is not None and math.isfinite(x)]


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
