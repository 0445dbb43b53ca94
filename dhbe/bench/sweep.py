"""Runs the cases without a result: each once, its needs first, independently of failures of others."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dhbe.bench import code
from dhbe.bench.cases import Case, with_needs
from dhbe.bench.crew import Task
from dhbe.bench.store import CaseRecord, Outcome, Store


class Team(Protocol):
    """Workers for tasks: local processes, or a cluster."""

    @property
    def free(self) -> int: ...

    def hand(self, task: Task) -> None: ...

    def outcomes(self) -> Iterator[tuple[Case, Outcome | str]]: ...


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    cases: Mapping[str, Case]
    """The requested cases with everything that they need, each after its needs."""
    codes: Mapping[str, str]
    """Versions of their code."""
    waiting: Mapping[str, Case]
    """Cases without a result, and cases whose files others need."""

    @property
    def minutes(self) -> float:
        """Estimated duration, sequentially."""
        return sum(case.minutes for case in self.waiting.values())


def plan(asked: Sequence[Case], store: Store, *, any_code: bool = False) -> Plan:
    """Plans the cases that have no result yet.

    Args:
        asked: The cases.
        store: Where results lie.
        any_code: Results by older code count too.
    """
    cases = with_needs(asked)
    codes = {key: code.version(case) for key, case in cases.items()}
    for key, case in cases.items():  # new code of a victim invalidates results on it
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
    """A plan being executed."""

    plan: Plan
    store: Store
    device: str = "auto"
    any_code: bool = False
    watch: Callable[[Case, CaseRecord, int], None] = lambda case, record, done: None
    """Called after each case, with the number of cases done."""
    failed: dict[str, str] = field(default_factory=dict)
    """Errors of cases without a result, by id."""

    def run(self, team: Team) -> None:
        """Runs until no case is waiting."""
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
                if busy.pop(case.id, None):  # ignores a second outcome of the same case
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
