"""Cases, their identity, and the order in which a sweep runs them."""

import json

import pytest

from dhbe.bench import SCALES, SMOKE, code, sweep
from dhbe.bench.cases import called, with_needs
from dhbe.bench.catalogue import NAMES, find
from dhbe.bench.store import Outcome
from dhbe.errors import Refused
from tests.bench_records import VICTIM, told


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
