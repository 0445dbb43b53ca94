import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_readme_shows_the_table_that_the_committed_records_give():
    table = runpy.run_path(str(ROOT / "benchmarks" / "table.py"))
    rows = table["table"](ROOT / "results" / "erasures")
    assert rows.count("\n") > 1, "no erasure among the records"
    assert table["shown"]((ROOT / "README.md").read_text()) == rows
