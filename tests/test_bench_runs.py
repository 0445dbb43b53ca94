"""Sweeps in processes of their own: by command, killed, on clusters, watched."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dhbe.bench import SMOKE
from dhbe.bench.catalogue import find
from dhbe.bench.store import read
from dhbe.cli import main
from dhbe.errors import Refused
from tests.bench_records import VICTIM, run_of, told

ROOT = Path(__file__).parents[1]
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
