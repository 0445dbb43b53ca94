import attacks
import calibration
import memory
import pages
import pareto
import peers
import precision
import pytest
import signs
import speed
import sweep
import table
import target

from dhbe.defenses import PRESETS
from dhbe.defenses.scan import MIDDLE, SLOPE

RESULTS = pages.ROOT / "results"
MADE = {
    ("README.md", "table.py"): lambda: table.table(RESULTS / "erasures"),
    ("docs/performance.md", "speed.py"): lambda: speed.table(RESULTS / "speed"),
    ("docs/performance.md", "memory.py"): lambda: memory.table(RESULTS / "memory"),
    ("docs/performance.md", "pareto.py"): pareto.table,
    ("docs/performance.md", "precision.py"): precision.table,
    ("docs/performance.md", "target.py"): lambda: target.table(RESULTS / "target"),
    ("docs/method.md", "calibration.py"): lambda: calibration.table(RESULTS / "calibration"),
    ("docs/method.md", "signs.py"): lambda: signs.table(RESULTS / "signs"),
    ("docs/method.md", "sweep.py parts"): sweep.parts,
    ("docs/method.md", "sweep.py signs"): sweep.signs,
    ("docs/defenses.md", "peers.py"): lambda: peers.table(RESULTS / "peers"),
    **{
        ("docs/attacks.md", f"attacks.py {name}"): lambda name=name: attacks.tables()[name]
        for name in ("victims", "classes", "directions", "triggers")
    },
}


@pytest.mark.parametrize(("page", "name"), MADE)
def test_pages_show_the_tables_that_the_committed_records_give(page, name):
    rows = MADE[page, name]()
    assert rows.count("\n") > 1, "no records"
    assert pages.shown(page, name) == rows


def test_the_scan_has_the_threshold_and_the_curve_of_the_fitted_half():
    fitted, _ = calibration.seen(RESULTS / "calibration")
    assert PRESETS["fast"].suspicion == pytest.approx(calibration.best_threshold(fitted), abs=0.05)
    assert pytest.approx(calibration.curve(fitted), abs=0.05) == (MIDDLE, SLOPE)
