"""Tables, figures and exports from records of cases."""

import csv

import pytest

from dhbe.bench import SMOKE, Grid, pages, rendering, showing
from dhbe.bench.catalogue import cases, find
from dhbe.bench.drawing import Curves, Result, Table
from dhbe.bench.store import Outcome, Store
from dhbe.cli import main
from dhbe.errors import Refused
from dhbe.evaluation.diagnostics import class_distances
from tests.bench_records import VICTIM, run_of, told


def test_every_experiment_is_drawn_in_every_form(store, tmp_path):
    store.records.mkdir()
    for each in find(["all"]):
        for case in each.cases(SMOKE):
            found = {"distance": 1.0, "closest": 2.0, "mean": 3.0}
            record = run_of(case) if case.work in ("erase", "plant", "scan") else None
            store.keep(case, Outcome(told(case, found=None if record else found, record=record)))
        page = showing.page(each, cases(each, SMOKE, {}), store, SMOKE)
        assert all(drawn.table.rows or drawn.table.heads == ["picture", "file"] for drawn in page.drawn), each.name
        assert all("commit abc" in showing.text(page, form) for form in rendering.FORMS)
        if each.name == "figure-7":
            showing.write(page, tmp_path / "drawn", store)
    ends = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert ends == {"figure-7.md", "figure-7.tex", "figure-7.csv", "figure-7.html", "figure-7-1.svg"}
    assert "![Figure 7" in (tmp_path / "drawn/figure-7.md").read_text()


def test_a_grid_shows_means_deviations_failures_and_the_papers_figures():
    def result(size, defense, seed, **more):
        case = SMOKE.ours(VICTIM, seed=seed)
        return Result({"size": size, "defense": defense}, told(case, **more), case.stem)

    results = [
        result(3, "dhbe", 0, found={"acc": 90.0, "asr": 1.0}), result(3, "dhbe", 1, found={"acc": 92.0, "asr": 3.0}),
        result(3, "nad", 0, error="no"), result(5, "dhbe", 0, found={"acc": 80.0}),
    ]  # fmt: skip
    paper = {(3, "dhbe"): (94.05, 0.02), (5, "dhbe"): (94.46, 0.12)}
    drawn = Grid(rows=("size",), columns="defense", values=("acc", "asr"), paper=paper, mean=True)(results)
    assert drawn.table.heads == ["size", "dhbe: ACC % / ASR %", "nad: ACC % / ASR %"]
    assert drawn.table.rows == [
        ["3", "91.0 ± 1.4 / 2.0 ± 1.4 (94.05 / 0.02)", "failed"],
        ["5", "80.0 / — (94.46 / 0.12)", "—"],
        ["mean", "85.5 / 2.0 (94.25 / 0.07)", "— / —"],
    ]


def test_a_chart_has_a_point_for_each_x_and_a_curve_where_it_is_fitted():
    def result(lr, acc, asr):
        case = SMOKE.ours(VICTIM)
        return Result({"lr": lr, "defense": "nad"}, told(case, found={"acc": acc, "asr": asr}), case.stem)

    results = [result(0.1, 90.0, 80.0), result(0.1, 92.0, 100.0), result(0.2, 70.0, 5.0)]
    (panel,) = Curves(x="lr", y=("asr",), lines=("defense",))(results).panels
    assert [(point.x, point.y) for point in panel.lines["nad"]] == [(0.1, 90.0), (0.2, 5.0)]
    drawn = Curves(x="acc", y=("asr",), lines=("defense",), fitted=True)(results)
    assert drawn.table.rows == [["nad", "84.0 ± 12.2", "61.7 ± 50.1"]]
    x, y = rendering.logistic([point.x for point in drawn.panels[0].lines["nad"]], [80.0, 100.0, 5.0])
    assert (x[0], x[-1]) == (70.0, 92.0)
    assert y == sorted(y)
    assert y[0] < 20 < 80 < y[-1]
    assert rendering.svg(drawn) == rendering.svg(drawn)
    assert rendering.logistic([1.0, 1.0], [5.0, 6.0]) == ([], [])


def test_tables_are_written_so_that_every_form_reads_them_right():
    table = Table("A & B", ["a|b", "x_1"], [["5 %", "<1, ± 2"]])
    assert rendering.markdown(table) == "| a\\|b | x_1 |\n| --- | --- |\n| 5 % | <1, ± 2 |"
    assert r"5 \% & <1, $\pm$ 2 \\" in rendering.latex(table)
    assert list(csv.reader(rendering.comma_separated(table).splitlines())) == [["a|b", "x_1"], ["5 %", "<1, ± 2"]]
    assert "<caption>A &amp; B</caption>" in rendering.as_html(table)
    assert "<td>&lt;1, ± 2</td>" in rendering.as_html(table)


def test_check_finds_a_page_that_shows_other_figures_and_update_mends_it(tmp_path, store, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = Store(tmp_path / "results/bench/smoke", tmp_path / "work")
    records.records.mkdir(parents=True)
    for case in find(["table-1"])[0].cases(SMOKE):
        records.keep(case, Outcome(told(case, found={"distance": 7.25})))
    page = tmp_path / "README.md"
    page.write_text(f"# A\n\n{pages.BEGIN}bench table-1 smoke -->\nold\n{pages.END}\n\nB\n")
    assert main(["bench", "show", "--check"]) == 1
    assert "README.md" in capsys.readouterr().err
    assert main(["bench", "show", "--check", "--update"]) == 0
    assert "| pixel | 7.2 |" in page.read_text()
    assert page.read_text().startswith("# A\n\n<!--")
    assert page.read_text().endswith("\n\nB\n")
    assert main(["bench", "show", "--check"]) == 0
    page.write_text(page.read_text().replace("table-1", "table-99"))
    assert main(["bench", "show", "--check"]) == 2


def test_export_has_a_row_for_each_record(store, tmp_path):
    store.records.mkdir()
    done, failed = SMOKE.ours(VICTIM), SMOKE.by(VICTIM, "nad")
    store.keep(done, Outcome(told(done, record=run_of(done))))
    store.keep(failed, Outcome(told(failed, error="no")))
    from dhbe.bench import export

    assert export.write(tmp_path / "all.csv", store.records) == 2
    rows = {row["case"]: row for row in csv.DictReader((tmp_path / "all.csv").read_text().splitlines())}
    assert (rows[done.stem]["acc"], rows[done.stem]["acc_before"], rows[done.stem]["commit"]) == ("90.0", "95.0", "abc")
    assert (rows[failed.stem]["error"], rows[failed.stem]["acc"]) == ("no", "")
    with pytest.raises(Refused, match=r"\.csv or \.parquet"):
        export.write(tmp_path / "all.xls", store.records)
    parquet = pytest.importorskip("pyarrow.parquet")
    export.write(tmp_path / "all.parquet", store.records)
    assert sorted(parquet.read_table(tmp_path / "all.parquet")["case"].to_pylist()) == sorted(rows)


def test_distances_of_classes_are_those_of_points_on_a_line():
    import torch

    from dhbe.data import Images

    pixels = torch.tensor([0, 0, 255, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    images = Images(pixels, torch.tensor([0, 0, 1, 1]), ("a", "b"))
    assert class_distances(images, 3, 2) == {(0, 1): pytest.approx(1.0)}
