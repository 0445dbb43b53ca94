import pytest

from dhbe.search.scan import MIDDLE, SLOPE
from dhbe.search.survey import Survey
from experiments import attacks, calibration, constants, pages, pareto, peers, precision, signs, sweep, table
from timings import memory, speed, target

RESULTS = pages.ROOT / "results"
MADE = {
    ("README.md", "experiments/table.py"): lambda: table.table(RESULTS / "erasures"),
    ("README.md", "experiments/table.py today"): lambda: table.table(RESULTS / "today"),
    ("docs/performance.md", "timings/speed.py"): lambda: speed.table(RESULTS / "speed"),
    ("docs/performance.md", "timings/memory.py"): lambda: memory.table(RESULTS / "memory"),
    ("docs/performance.md", "experiments/pareto.py"): pareto.table,
    ("docs/performance.md", "experiments/precision.py"): precision.table,
    ("docs/performance.md", "timings/target.py"): lambda: target.table(RESULTS / "target"),
    ("docs/method.md", "experiments/calibration.py"): lambda: calibration.table(RESULTS / "calibration"),
    ("docs/method.md", "experiments/signs.py"): lambda: signs.table(RESULTS / "signs"),
    ("docs/method.md", "experiments/sweep.py parts"): sweep.parts,
    ("docs/method.md", "experiments/sweep.py signs"): sweep.signs,
    ("docs/models.md", "experiments/constants.py"): constants.table,
    ("docs/defenses.md", "experiments/peers.py"): lambda: peers.table(RESULTS / "peers"),
    **{
        ("docs/attacks.md", f"experiments/attacks.py {name}"): lambda name=name: attacks.tables()[name]
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
    assert Survey().anomaly_threshold == pytest.approx(calibration.best_threshold(fitted), abs=0.05)
    assert pytest.approx(calibration.curve(fitted), abs=0.05) == (MIDDLE, SLOPE)
