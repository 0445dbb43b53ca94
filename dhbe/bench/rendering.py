"""Tables as Markdown, LaTeX, CSV and HTML; charts as SVG."""

import csv
import html
import io
import math
from collections.abc import Callable, Sequence

from dhbe.bench.drawing import Drawn, Panel, Table

COLOURS = ("#0a7e8d", "#c2410c", "#4d7c0f", "#7c3aed", "#b91c1c", "#525252", "#0369a1", "#a16207")
SPECIAL = {"\\": r"\textbackslash{}", "±": r"$\pm$", "—": "---"} | {char: f"\\{char}" for char in "&%$#_{}"}
"""Characters with a special meaning in LaTeX."""


def markdown(table: Table) -> str:
    """A table in Markdown."""
    cells = (
        [part.replace("|", "\\|") for part in row] for row in (table.heads, ["---"] * len(table.heads), *table.rows)
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def latex(table: Table) -> str:
    """A table as a LaTeX tabular with booktabs."""

    def line(row: Sequence[str]) -> str:
        return " & ".join("".join(SPECIAL.get(char, char) for char in part) for part in row) + r" \\"

    rows = [line(row) for row in table.rows]
    head = [rf"\begin{{tabular}}{{{'l' * len(table.heads)}}}", r"\toprule", line(table.heads), r"\midrule"]
    return "\n".join([*head, *rows, r"\bottomrule", r"\end{tabular}"])


def comma_separated(table: Table) -> str:
    """A table as CSV (RFC 4180, but with Unix line ends)."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.heads, *table.rows])
    return out.getvalue().rstrip("\n")


def as_html(table: Table) -> str:
    """A table as an HTML element with a caption."""

    def line(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(part)}</{tag}>" for part in row) + "</tr>"

    caption = f"<caption>{html.escape(table.title)}</caption>" if table.title else ""
    rows = "\n".join(line(row, "td") for row in table.rows)
    return f"<table>{caption}\n<thead>{line(table.heads, 'th')}</thead>\n<tbody>\n{rows}\n</tbody></table>"


FORMS: dict[str, Callable[[Table], str]] = {
    "markdown": markdown, "latex": latex, "csv": comma_separated, "html": as_html,
}  # fmt: skip


def svg(drawn: Drawn) -> str:
    """The chart as SVG; equal charts give equal text."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(3, len(drawn.panels))
    rows = -(-len(drawn.panels) // columns)
    with matplotlib.rc_context({"svg.hashsalt": "dhbe", "font.size": 9}):
        figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
        for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, drawn.panels, strict=False):
            (_boxes if panel.boxes else _lines)(axes, panel)
        for axes in figure.axes[len(drawn.panels) :]:
            axes.remove()
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _lines(axes, panel: Panel) -> None:
    for number, (name, points) in enumerate(panel.lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        x, y = [point.x for point in points], [point.y for point in points]
        if panel.joined:
            axes.errorbar(x, y, [point.spread for point in points], label=name, color=colour, marker="o", markersize=3)
        else:
            axes.scatter(x, y, label=name, color=colour, s=12)
            axes.plot(*logistic(x, y), color=colour, linewidth=1)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    if len(panel.lines) > 1:
        axes.legend(fontsize=7)


def _boxes(axes, panel: Panel) -> None:
    names = ("whislo", "q1", "med", "q3", "whishi")
    axes.bxp(
        [{"label": name, **dict(zip(names, box, strict=True))} for name, box in panel.boxes.items()], showfliers=False
    )
    axes.set(title=panel.title)
    axes.tick_params(axis="x", rotation=30)


def logistic(x: Sequence[float], percent: Sequence[float]) -> tuple[list[float], list[float]]:
    """The maximum-likelihood logistic curve through points, as 50 points; y is in percent.

    Args:
        x: At least two different values; of fewer there is no curve.
        percent: 0 to 100.
    """
    if len(set(x)) < 2:
        return [], []
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    low, width = min(x), max(x) - min(x)
    at = [[(value - low) / width] for value in x]
    hits = [share / 100 for share in percent]
    grid = np.linspace(0, 1, 50)
    weights = [*hits, *(1 - hit for hit in hits)]
    kinds = [True] * len(x) + [False] * len(x)
    if not 0 < math.fsum(hits) < len(x):  # all 0 or all 1: nothing to fit
        return [low, low + width], [percent[0]] * 2
    fit = LogisticRegression(C=100.0).fit(at * 2, kinds, sample_weight=weights)
    rates = 100 * fit.predict_proba(grid[:, None])[:, 1]
    return (low + width * grid).tolist(), rates.tolist()
