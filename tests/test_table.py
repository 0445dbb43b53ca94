import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("script", "records", "page"),
    [
        ("table", "erasures", "README.md"),
        ("speed", "speed", "docs/performance.md"),
        ("calibration", "calibration", "docs/method.md"),
        ("signs", "signs", "docs/method.md"),
    ],
)
def test_pages_show_the_tables_that_the_committed_records_give(script, records, page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))
    rows = table["table"](ROOT / "results" / records)
    assert rows.count("\n") > 1, "no records"
    assert table["shown"]((ROOT / page).read_text()) == rows
