"""Logs each finished case to TensorBoard and MLflow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dhbe.bench.cases import Case
from dhbe.bench.drawing import RATES, Result
from dhbe.bench.store import CaseRecord
from dhbe.errors import Refused

Watch = Callable[[Case, CaseRecord], None]


@contextmanager
def watching(tensorboard: Path | None, mlflow: str | None) -> Iterator[Watch]:
    """A function that logs a case to the requested boards.

    Args:
        tensorboard: Folder of its event files; None tells it nothing.
        mlflow: Where its runs are kept, as `file:runs/mlflow` or `http://...`; None tells it nothing.

    Raises:
        Refused: A board is not installed.
    """
    told = [each for each in (_tensorboard(tensorboard), _mlflow(mlflow)) if each]

    def watch(case: Case, record: CaseRecord) -> None:
        for tell in told:
            tell(case, record)

    yield watch


def figures(case: Case, record: CaseRecord) -> dict[str, float]:
    """Rates in percent and other results of a case, by name."""
    result = Result({}, record, case.stem)
    measured = result.measures()
    names = (*RATES, "lost", "mib", *(measured.signs if measured else ()), *record.found)
    values = {name: result.value(name) for name in names}
    return {"seconds": record.seconds} | {
        name: float(value) for name, value in values.items() if isinstance(value, int | float)
    }


def _tensorboard(folder: Path | None) -> Watch | None:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise Refused("--tensorboard needs tensorboard: pip install 'dhbe[tensorboard]'") from error

    def watch(case: Case, record: CaseRecord) -> None:
        with SummaryWriter(str(folder / case.stem)) as writer:
            for name, value in figures(case, record).items():
                writer.add_scalar(f"case/{name}", value)

    return watch


def _mlflow(uri: str | None) -> Watch | None:
    if uri is None:
        return None
    try:
        import mlflow  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError as error:
        raise Refused("--mlflow needs mlflow: pip install 'dhbe[mlflow]'") from error
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("dhbe")

    def watch(case: Case, record: CaseRecord) -> None:
        with mlflow.start_run(run_name=case.stem):
            labels = {f"label.{name}": value for name, value in case.labels.items()}
            mlflow.log_params({"work": case.work, "id": case.id, "code": record.code, **labels})
            mlflow.log_metrics(figures(case, record))
            if record.error:
                mlflow.set_tag("error", record.error)

    return watch
