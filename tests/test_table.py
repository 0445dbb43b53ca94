from pathlib import Path

import pytest

from dhbe.bench import pages
from dhbe.search.scan import MIDDLE, SLOPE
from dhbe.search.survey import Survey
from experiments import ROOT, calibration

MARKS = [(page, name) for page in ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
         for name in pages.names((ROOT / page).read_text())]  # fmt: skip


@pytest.mark.parametrize(("page", "name"), MARKS)
def test_pages_show_the_tables_that_the_committed_records_give(page, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = pages.drawn(name, Path("results/bench"))
    assert rows.count("\n") > 1, "no records"
    assert pages.between((ROOT / page).read_text(), name) == rows


def test_the_scan_has_the_threshold_and_the_curve_of_the_fitted_half():
    fitted, _ = calibration.seen(calibration.RESULTS)
    assert Survey().anomaly_threshold == pytest.approx(calibration.best_threshold(fitted), abs=0.05)
    assert pytest.approx(calibration.curve(fitted), abs=0.05) == (MIDDLE, SLOPE)
