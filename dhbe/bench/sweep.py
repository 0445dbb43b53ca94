"""Running what has no result yet: each case once, what is needed first, whatever becomes of the others."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dhbe.bench import code
from dhbe.bench.cases import Case, with_needs
from dhbe.bench.crew import Task
from dhbe.bench.store import CaseRecord, Outcome, Store


class Team(Protocol):
    """Whoever works on tasks: processes of this machine, or a cluster."""

    @property
    def free(self) -> int: ...

    def hand(self, task: Task) -> None: ...

    def outcomes(self) -> Iterator[tuple[Case, Outcome | str]]: ...


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    cases: Mapping[str, Case]
    """Those that were asked for, with all that they need, each behind what it needs."""
    codes: Mapping[str, str]
    """Versions of their code."""
    waiting: Mapping[str, Case]
    """Those without a result, and those whose weights others wait for."""

    @property
    def minutes(self) -> float:
        """That it takes, about, one after the other."""
        return sum(case.minutes for case in self.waiting.values())


def plan(asked: Sequence[Case], store: Store, *, any_code: bool = False) -> Plan:
    """What of these cases has no result yet.

    Args:
        asked: The cases.
        store: Where results lie.
        any_code: Results by older code count too.
    """
    cases = with_needs(asked)
    codes = {key: code.version(case) for key, case in cases.items()}
    for key, case in cases.items():  # new code of a victim makes what was done on it old
        codes[key] = code.joined([codes[key], *(codes[need.id] for need in case.needs)]) if case.needs else codes[key]
    wanted: dict[str, Case] = {}

    def want(case: Case) -> None:
        if case.id not in wanted:
            for need in case.needs:
                if store.handed(need, None if any_code else codes[need.id]) is None:
                    want(need)
            wanted[case.id] = case

    for case in asked:
        if not store.done(case, None if any_code else codes[case.id]):
            want(case)
    order = {key: wanted[key] for key in cases if key in wanted}
    return Plan(cases, codes, order)


@dataclass
class Sweep:
    """A plan under way."""

    plan: Plan
    store: Store
    device: str = "auto"
    any_code: bool = False
    watch: Callable[[Case, CaseRecord, int], None] = lambda case, record, done: None
    """Called after each case, with how many are done."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why cases have no result, by id."""

    def run(self, team: Team) -> None:
        """Works until nothing waits."""
        waiting, busy, done = dict(self.plan.waiting), dict[str, Case](), 0

        def end(case: Case, outcome: Outcome | str) -> None:
            nonlocal done
            if isinstance(outcome, str):
                outcome = Outcome(self._lost(case, outcome))
            self.store.keep(case, outcome)
            if outcome.record.error:
                self.failed[case.id] = outcome.record.error
            done += 1
            self.watch(case, outcome.record, done)

        while waiting or busy:
            for case in list(waiting.values()):
                if any(need.id in waiting or need.id in busy for need in case.needs):
                    continue
                lacking = [need for need in case.needs if need.id in self.failed]
                if lacking:
                    del waiting[case.id]
                    end(case, f"{lacking[0].name} failed: {self.failed[lacking[0].id]}")
                elif team.free > 0:
                    del waiting[case.id]
                    busy[case.id] = case
                    team.hand(self._task(case))
            for case, outcome in team.outcomes() if busy else ():
                if busy.pop(case.id, None):  # one that arrives twice was kept the first time
                    end(case, outcome)

    def _task(self, case: Case) -> Task:
        needed = []
        for need in case.needs:
            handed = self.store.handed(need, None if self.any_code else self.plan.codes[need.id])
            needed.append(handed or {})
        version = self.plan.codes[case.id]
        return case, version, needed, self.device, self.store.work / f"{case.id}-{version}"

    def _lost(self, case: Case, why: str) -> CaseRecord:
        return CaseRecord(
            id=case.id, code=self.plan.codes[case.id], name=case.name, work=case.work, settings=dict(case.settings),
            needs=[need.id for need in case.needs], error=why, seconds=0.0, device="", versions={},
            finished=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        )  # fmt: skip
