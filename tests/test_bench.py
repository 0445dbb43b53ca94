import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dhbe.bench import SCALES, SMOKE, Grid, code, pages, rendering, showing, sweep
from dhbe.bench.cases import called, with_needs
from dhbe.bench.catalogue import NAMES, cases, find
from dhbe.bench.drawing import Curves, Result, Table
from dhbe.bench.store import CaseRecord, Outcome, Store, read
from dhbe.cli import main
from dhbe.errors import Refused
from dhbe.evaluation.diagnostics import class_distances
from dhbe.records import Measures, ModelInfo, Record

ROOT = Path(__file__).parents[1]
VICTIM = SMOKE.victim("badnets", 3)
SCRIPT = """
import os, time
from dhbe.bench import Experiment, Grid, called

def work(number, folder, deadly=0):
    tries = len(list(__import__("pathlib").Path(folder).glob(f"{number}.*")))
    open(f"{folder}/{number}.{os.getpid()}.{tries}", "w").close()
    if tries < deadly:
        os.kill(os.getpid(), 9)
    time.sleep(0.05)
    return {"square": number**2}

def cases(scale):
    count, deaths = int(os.environ["COUNT"]), os.environ.get("DEADLY", "").split()
    deaths += ["0"] * (count - len(deaths))
    return [
        called("work", __file__, name=f"case-{n}", labels={"n": n}, number=n, deadly=int(deaths[n]), folder=os.environ["LOG"])
        for n in range(count)
    ]

EXPERIMENT = Experiment("Squares", cases, [Grid(rows=("n",), values=("square",))])
"""


def told(case, *, error=None, version="0" * 12, found=None, record=None):
    return CaseRecord(
        id=case.id, code=version, name=case.name, work=case.work, settings=dict(case.settings),
        needs=[need.id for need in case.needs], error=error, found=found or {}, record=record, seconds=2.0, device="a CPU",
        versions={"dhbe": "1", "commit": "abc"}, finished="2026-01-02T03:04:05+00:00",
    )  # fmt: skip


def run_of(case, acc=0.9, asr=0.1):
    """What a case of a run would have come to."""
    info = ModelInfo(path=None, sha256=None, arch="resnet8", classes=10, input=(3, 16, 16), mean=(0.0,), std=(1.0,))
    boxes = {f"{what}_l{order}": (0.0, 1.0, 2.0, 3.0, 4.0) for what in ("features", "logits") for order in (1, 2)}
    signs = {"anomaly_index": 3.0, "suspected_class": 1.0}
    after = Measures(acc=acc, asr=asr, asr_x4=asr, asr_x9=asr, activations=boxes, signs=signs)
    before = Measures(acc=0.95, asr=1.0)
    kind, more = "erase", {"defense": {"name": "dhbe"}, "before": before, "after": after}
    if case.work != "erase":
        kind, more = "attack", {"attack": {"name": "badnets"}, "before": after}
    return Record(
        kind=kind, model=info, seconds=2.0, device="a CPU", precision="fp32", seed=0, finished="2026-01-02T03:04:05+00:00",
        **more,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "records", tmp_path / "work")


class Team:
    """Works by itself; what it comes to is told before, and everything arrives twice."""

    def __init__(self, errors=()):
        self.errors, self.tasks, self.seen = set(errors), [], []
        self.free = 2

    def hand(self, task):
        assert self.free > 0
        self.free -= 1
        self.tasks.append(task)
        self.seen.append(task[0].name)

    def outcomes(self):
        case, version, needed, *_ = self.tasks.pop(0)
        self.free += 1
        assert all(needed), "what it needs was not there"
        error = "RuntimeError: no" if case.name in self.errors else None
        files = {"weights": b"1"} if case.work == "plant" and not error else {}
        outcome = Outcome(told(case, error=error, version=version), files)
        return [(case, outcome), (case, outcome)]


def swept(asked, store, team, **more):
    planned = sweep.plan(asked, store, **more)
    going = sweep.Sweep(planned, store)
    with store.held():
        going.run(team)
    return going


def test_a_case_is_what_its_result_depends_on_and_not_what_it_is_called():
    case = SMOKE.by(VICTIM, "nad", size=3)
    assert case.id == SMOKE.by(SMOKE.victim("badnets", 3), "nad", size="three").labelled(x=1).id
    others = [
        SMOKE.by(VICTIM, "nad", seed=1), SMOKE.by(VICTIM, "nad", share="1 %"), SMOKE.by(VICTIM, "mcr"),
        SMOKE.by(SMOKE.victim("badnets", 5), "nad"), SMOKE.by(VICTIM, "nad", changes={"lr": 0.5}),
    ]  # fmt: skip
    assert len({case.id, *(each.id for each in others)}) == 6
    assert called("f", "/here/mine.py", name="a").id == called("f", "there/mine.py", name="a").id
    assert list(with_needs([case, case])) == [VICTIM.id, case.id]


def _written(path, text):
    path.write_text(text)
    return path


def test_only_code_that_a_case_runs_counts_and_comments_do_not(tmp_path):
    names = {path.relative_to(code.PACKAGE).as_posix() for path in code.files(SMOKE.by(VICTIM, "nad"))}
    assert {"defenses/peers/nad.py", "defenses/peers/few_data.py", "training.py", "api/running.py"} <= names
    assert not {"defenses/peers/mcr.py", "defenses/fast.py", "attacks/sig.py", "cli/bench.py", "report/page.py"} & names
    assert code.PACKAGE / "search/survey.py" in code.files(SMOKE.theirs(VICTIM, "fast"))
    assert code.PACKAGE / "attacks/badnets.py" in code.files(VICTIM)
    versions = []
    for number, text in enumerate(['"""A."""\nX = 1', "# nothing\nX = (1)", "X = 2"]):
        (tmp_path / str(number)).mkdir()
        file = tmp_path / str(number) / "mine.py"
        file.write_text(text)
        versions.append(code.version(called("f", str(file), name="a")))
    assert versions[0] == versions[1] != versions[2]
    settings = ["Setting('a', least=1)", "Setting('b', least=1)", "Setting('b', least=2)"]
    told = [code._meaning(_written(tmp_path / f"{number}.py", text)) for number, text in enumerate(settings)]
    assert told[0] == told[1] != told[2]
    file.write_text("def")
    code._tree.cache_clear()
    code._imported.cache_clear()
    with pytest.raises(Refused, match=r"as Python"):
        code.files(called("f", str(file), name="a"))


@pytest.mark.parametrize("scale", SCALES)
def test_experiments_share_cases_and_every_case_has_a_file_of_its_own(scale):
    found = {each.name: list(each.cases(SCALES[scale])) for each in find(["all"])}
    assert list(found) == list(NAMES)
    assert all(found.values())
    every = with_needs(case for mine in found.values() for case in mine)
    assert len({case.stem for case in every.values()}) == len(every)
    rows = {case.id for case in found["table-3"] if case.labels["defense"] == "dhbe"}
    assert rows == {case.id for case in found["table-5"] if case.labels["defense"] == "dhbe"}
    assert json.dumps([case.settings for case in every.values()])


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


def test_what_is_needed_runs_first_what_fails_stops_nothing_and_what_is_done_is_skipped(store):
    good, bad = SMOKE.victim("badnets", 3), SMOKE.victim("blend")
    asked = [SMOKE.by(good, "nad"), SMOKE.by(good, "mcr"), SMOKE.by(bad, "nad")]
    team = Team(errors=[bad.name])
    going = swept(asked, store, team)
    assert sorted(team.seen) == sorted([good.name, bad.name, asked[0].name, asked[1].name])
    assert team.seen.index(good.name) < team.seen.index(asked[0].name)
    assert store.read(asked[0]).error is None
    assert store.read(asked[2]).error == f"{bad.name} failed: RuntimeError: no"
    assert len(going.failed) == 2
    assert len(list(store.records.glob("*.json"))) == 5
    again = Team()
    swept(asked, store, again)
    assert again.seen == [bad.name, asked[2].name]
    assert not sweep.plan(asked, store).waiting


def test_older_code_runs_again_unless_any_code_counts(store, monkeypatch):
    asked = [SMOKE.by(VICTIM, "nad")]
    swept(asked, store, Team())
    monkeypatch.setattr(code, "version", lambda case: "1" * 12)
    assert len(sweep.plan(asked, store).waiting) == 2
    assert not sweep.plan(asked, store, any_code=True).waiting


def test_one_sweep_at_a_time_and_a_broken_record_is_named(store):
    with store.held(), pytest.raises(Refused, match="another sweep"), store.held():
        pass
    path = store.records / f"{VICTIM.stem}.json"
    path.write_text("{}")
    with pytest.raises(Refused, match="not a record of a case"):
        store.read(VICTIM)


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


def test_wrong_words_are_refused_in_a_line(capsys, tmp_path):
    (tmp_path / "empty.py").write_text("X = 1\n")
    for words in (
        "walk", "run table-99", "run nothing.py", f"run {tmp_path}/empty.py", "run table-1 --only trigger", "show",
        "run table-1 --only trigger=nothing", "export all.csv --out nowhere",
    ):  # fmt: skip
        assert main(["bench", *words.split()]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_nothing_heavy_is_imported_before_it_is_asked_for():
    code = "import sys, dhbe.bench, dhbe.bench.sweep; print([m for m in %r if m in sys.modules])"
    heavy = ("torch", "ray", "mlflow", "tensorboard", "matplotlib", "pyarrow", "sklearn")
    ran = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.strip() == "[]"


def ran(folder, *words, **more):
    """A sweep in a process of its own, over the squares of SCRIPT."""
    (folder / "log").mkdir(exist_ok=True)
    (folder / "squares.py").write_text(SCRIPT)
    here = {**os.environ, "PYTHONPATH": str(ROOT), "LOG": str(folder / "log"), **{k: str(v) for k, v in more.items()}}
    command = [
        sys.executable,
        "-m",
        "dhbe",
        "bench",
        "run",
        "squares.py",
        "--out",
        "r",
        "--work",
        "w",
        "--quiet",
        *words,
    ]
    return subprocess.Popen(command, cwd=folder, env=here, stderr=subprocess.PIPE, text=True)


def squares(folder):
    found = [read(path) for path in (folder / "r" / "smoke").glob("*.json")]
    assert all(each.found["square"] == each.settings["settings"]["number"] ** 2 for each in found if not each.error)
    return sorted(each.settings["settings"]["number"] for each in found if not each.error)


def test_a_process_that_dies_is_begun_anew_and_in_the_end_given_up(tmp_path):
    going = ran(tmp_path, COUNT=3, DEADLY="1 99 0")
    assert going.wait(280) == 4
    assert "1 cases failed" in going.communicate()[1]
    assert squares(tmp_path) == [0, 2]
    assert len(list((tmp_path / "log").iterdir())) == 2 + 3 + 1
    (failed,) = [each for path in (tmp_path / "r/smoke").glob("*.json") if (each := read(path)).error]
    assert failed.error == "its process died 3 times, perhaps for lack of memory"


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_every_case_is_there_once(tmp_path):
    kills = 0
    while kills < 5:
        going = ran(tmp_path, "--jobs", "2", COUNT=400)
        done = len(list((tmp_path / "log").iterdir()))
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "log").iterdir())) < done + 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        going.send_signal(signal.SIGKILL)
        assert going.wait() == -signal.SIGKILL
        kills += 1
    last = ran(tmp_path, "--jobs", "2", COUNT=400)
    assert last.wait(240) == 0, last.communicate()[1]
    assert squares(tmp_path) == list(range(400))
    assert 400 <= len(list((tmp_path / "log").iterdir())) <= 400 + 2 * kills
    assert not list((tmp_path / "r").rglob(".*.tmp"))


@pytest.mark.slow
def test_two_workers_of_ray_do_all_cases_though_one_is_killed(tmp_path):
    pytest.importorskip("ray")
    going = ran(tmp_path, "--on", "auto", COUNT=8, DEADLY="0 1")
    assert going.wait(280) == 0, going.communicate()[1]
    assert squares(tmp_path) == list(range(8))


def example():
    """The experiment that docs/bench.md shows."""
    text = (ROOT / "docs/bench.md").read_text().partition("<!-- example: noise.py -->")[2]
    return text.partition("```python\n")[2].partition("```")[0]


def test_the_experiment_of_the_docs_is_one_short_file_and_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert len(example().splitlines()) <= 30
    Path("noise.py").write_text(example())
    assert main(["bench", "run", "noise.py", "--quiet"]) == 0
    assert main(["bench", "show", "noise.py"]) == 0
    assert "| 0.5 | " in capsys.readouterr().out
    assert main(["bench", "run", "noise.py", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("0 of 3 cases")


@pytest.mark.slow
def test_all_of_the_smoke_scale_runs_to_its_tables_and_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["bench", "run", "all", "--quiet", "--jobs", "2"]) == 0
    assert main(["bench", "show", "all", "--to", "drawn"]) == 0
    for each in find(["all"]):
        assert "| " in (tmp_path / "drawn" / f"{each.name}.md").read_text()


@pytest.mark.parametrize("board", ["tensorboard", "mlflow"])
def test_boards_are_told_of_each_case_where_they_are_installed(board, tmp_path, monkeypatch):
    from dhbe.bench.watchers import figures, watching

    case = SMOKE.ours(VICTIM, size=3)
    record = told(case, record=run_of(case))
    assert figures(case, record) | {"seconds": 2.0, "acc": 90.0, "lost": pytest.approx(5.0)} == figures(case, record)
    where = {"tensorboard": tmp_path} if board == "tensorboard" else {"mlflow": f"sqlite:///{tmp_path}/runs.db"}
    try:
        __import__(board)
    except ImportError:
        with pytest.raises(Refused, match=board), watching(**{"tensorboard": None, "mlflow": None, **where}):
            pass
        pytest.skip(f"{board} is not installed")
    if board == "mlflow":
        pytest.importorskip("sqlalchemy")
    with watching(**{"tensorboard": None, "mlflow": None, **where}) as watch:
        watch(case, record)
    assert any(path.is_file() for path in tmp_path.rglob("*"))
