"""Runs cases on a Ray cluster, which restarts tasks of dead workers; the records are the same as for local runs.

Workers run this package's code, which is sent with the tasks. They read data from their own machines ($DHBE_DATA) and
return outcomes, which the sweep writes, so that machines need no connection other than Ray.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dhbe.bench.cases import Case
from dhbe.bench.crew import LIVES, Task
from dhbe.bench.store import Outcome
from dhbe.errors import Refused

CPUS = 1
"""CPUs per task; if the cluster has GPUs, a task also takes one of them."""


@dataclass
class Cluster:
    """A connection to Ray, used with `with`.

    Args:
        address: `auto` finds a cluster on this machine, or starts one for the duration of the sweep; `ray://HOST:PORT` is
            a remote one.
    """

    address: str
    _ray: Any = None
    _work: Any = None
    _slots: int = 0
    _busy: dict[Any, Case] = field(default_factory=dict)

    @property
    def free(self) -> int:
        """Number of tasks to submit now; Ray keeps some queued besides those that run."""
        return 2 * self._slots - len(self._busy)

    def hand(self, task: Task) -> None:
        """Submits a task."""
        case, code, needed, device, _ = task
        lent = [self._ray.put(dict(each)) for each in needed]
        file = case.settings.get("file")
        source = Path(file).read_text() if file else None
        self._busy[self._work.options(name=case.stem).remote(case, code, device, source, *lent)] = case

    def outcomes(self) -> Iterator[tuple[Case, Outcome | str]]:
        """Waits for tasks to end; yields each with its outcome, or an error."""
        done, _ = self._ray.wait(list(self._busy), num_returns=1)
        for reference in done:
            case = self._busy.pop(reference)
            try:
                outcome: Outcome | str = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                outcome = f"Ray gave it up: {str(error).splitlines()[0][:300]}"
            yield case, outcome

    def __enter__(self) -> "Cluster":
        try:
            import ray  # pyright: ignore[reportMissingImports] (an extra)
        except ImportError as error:
            raise Refused("--on needs Ray: pip install 'dhbe[ray]'") from error
        import dhbe

        self._ray = ray
        variables = {name: os.environ[name] for name in ("DHBE_DATA", "OMP_NUM_THREADS") if name in os.environ}
        how: dict[str, Any] = {
            "runtime_env": {"py_modules": [str(Path(dhbe.__file__).parent)], "env_vars": variables},
            "log_to_driver": False, "logging_level": logging.ERROR,
        }  # fmt: skip
        try:
            try:
                ray.init(address=self.address, **how)
            except ConnectionError:
                if self.address != "auto":
                    raise
                ray.init(include_dashboard=False, **how)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise Refused(f"no cluster at {self.address}: {str(error).splitlines()[0][:200]}") from error
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        self._slots = gpus or int(there.get("CPU", 1))
        self._work = ray.remote(num_cpus=CPUS, num_gpus=1 if gpus else 0, max_retries=LIVES - 1)(_worked)
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()


def _worked(case: Case, code: str, device: str, source: str | None, *needed: Any) -> Outcome:
    """Runs one case on a worker; the user's file, which may not exist there, is passed as text."""
    import tempfile
    import warnings

    warnings.simplefilter("ignore")
    from dhbe.bench.working import work

    if source is None:
        return work(case, code, needed, device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(case.settings["file"]).name
        file.write_text(source)
        outcome = work(replace(case, settings={**case.settings, "file": str(file)}), code, needed, device)
    own = {"id": case.id, "settings": dict(case.settings)}
    return replace(outcome, record=outcome.record.model_copy(update=own))
