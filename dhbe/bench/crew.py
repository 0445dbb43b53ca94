"""Local worker processes, each with one case at a time; a worker that dies does not affect the others."""

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
"""A case, the version of its code, the results of its needs, the device, and a folder for its state."""

LIVES = 3
"""How often a case is started if its process dies."""


@dataclass
class _Worker:
    process: BaseProcess
    line: Any
    """Connection to the process."""
    task: Task | None = None


@dataclass
class Crew:
    """A pool of `jobs` processes, used with `with`. `hand` assigns a task, `outcomes` waits for results."""

    jobs: int
    _workers: list[_Worker] = field(default_factory=list)
    _died: dict[str, int] = field(default_factory=dict)

    @property
    def free(self) -> int:
        """Number of tasks that would start at once."""
        return self.jobs - sum(worker.task is not None for worker in self._workers)

    def hand(self, task: Task) -> None:
        """Starts a task."""
        idle = [worker for worker in self._workers if worker.task is None]
        worker = idle[0] if idle else self._hire()
        worker.task = task
        worker.line.send(task)

    def outcomes(self) -> Iterator[tuple[Case, Outcome | str]]:
        """Waits for tasks to end; yields each with its outcome, or an error. A task whose process died is restarted."""
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
                    yield case, f"its process died {LIVES} times, perhaps for lack of memory"
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
        other.close()  # so that the connection closes when the process ends
        self._workers.append(_Worker(process, line))
        return self._workers[-1]

    def _dismiss(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.line.close()
        worker.process.kill()
        worker.process.join()


def _serve(line: Any, number: int, threads: int) -> None:
    """The main loop of a worker: receives tasks and sends outcomes until the sweep ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # handled by the sweep
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    import warnings

    import torch

    warnings.simplefilter("ignore")  # warnings of libraries are not for users of a command
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
    """Ends this process when its parent, the sweep, has ended."""
    if parent is not None:
        parent.join()
        os._exit(1)
