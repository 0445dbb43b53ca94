"""Processes of this machine that work on cases, one case each at a time; one that dies takes no other with it."""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dhbe.bench.cases import Case
from dhbe.bench.store import Outcome

Needed = Sequence[Mapping[str, bytes]]
Task = tuple[Case, str, Needed, str, Path | None]
"""A case, the version of its code, what its needs handed on, the device, a folder for its state."""

LIVES = 3
"""How often a case is begun whose process dies."""


@dataclass
class _Worker:
    process: BaseProcess
    line: Any
    """What it is spoken to over."""
    task: Task | None = None


@dataclass
class Crew:
    """So many processes. `hand` gives one of them a task, `outcomes` waits for what is done; to be used with `with`."""

    jobs: int
    _workers: list[_Worker] = field(default_factory=list)
    _died: dict[str, int] = field(default_factory=dict)

    @property
    def free(self) -> int:
        """Tasks that would begin at once."""
        return self.jobs - sum(worker.task is not None for worker in self._workers)

    def hand(self, task: Task) -> None:
        """Begins a task."""
        idle = [worker for worker in self._workers if worker.task is None]
        worker = idle[0] if idle else self._hire()
        worker.task = task
        worker.line.send(task)

    def outcomes(self) -> Iterator[tuple[Case, Outcome | str]]:
        """Waits for a task to end: what it came to, or why nothing did. A task whose process died is begun anew."""
        busy = {worker.line: worker for worker in self._workers if worker.task}
        for line in connection.wait(list(busy)):
            worker = busy[line]
            task = worker.task
            assert task is not None
            try:
                outcome = worker.line.recv()
            except (EOFError, ConnectionError):
                self._dismiss(worker)
                case = task[0]
                self._died[case.id] = self._died.get(case.id, 0) + 1
                if self._died[case.id] < LIVES:
                    self.hand(task)
                else:
                    yield case, f"its process died {LIVES} times, as of a lack of memory"
            else:
                worker.task = None
                yield task[0], outcome

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in list(self._workers):
            self._dismiss(worker)

    def _hire(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        line, other = context.Pipe()
        told = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(told) if told.isdecimal() else max(1, (os.cpu_count() or 1) // self.jobs)
        process = context.Process(target=_serve, args=(other, len(self._workers), threads), daemon=True)
        process.start()
        other.close()  # so that the line ends when the process does
        self._workers.append(_Worker(process, line))
        return self._workers[-1]

    def _dismiss(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.line.close()
        worker.process.kill()
        worker.process.join()


def _serve(line: Any, number: int, threads: int) -> None:
    """The life of a process: tasks come, outcomes go, until the sweep ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep decides
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    import warnings

    import torch

    warnings.simplefilter("ignore")  # libraries' remarks are not for the user of a command
    from dhbe.api import machine
    from dhbe.bench.working import work

    torch.set_num_threads(threads)
    machine.keep_memory()
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    while True:
        try:
            line.send(work(*line.recv()))
        except (EOFError, OSError):
            return


def _end_with(parent: BaseProcess | None) -> None:
    """A process whose sweep was killed does not go on by itself."""
    if parent is not None:
        parent.join()
        os._exit(1)
