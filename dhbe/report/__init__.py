"""The report of a run, rendered from its record alone."""

from dhbe.report.charts import boxplot, chart, grid
from dhbe.report.page import compared, framed, render
from dhbe.report.verdicts import line, verdict
from dhbe.report.words import percent

__all__ = ["boxplot", "chart", "compared", "framed", "grid", "line", "percent", "render", "verdict"]
