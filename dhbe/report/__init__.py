"""The report of a run, drawn from its record alone."""

from dhbe.report.charts import boxplot, chart, grid
from dhbe.report.page import render
from dhbe.report.verdicts import line, verdict
from dhbe.report.words import percent

__all__ = ["boxplot", "chart", "grid", "line", "percent", "render", "verdict"]
