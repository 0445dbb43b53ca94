"""Stores records of cases in one folder, and files that cases pass to each other in another."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dhbe import files
from dhbe.bench.cases import Case
from dhbe.errors import Failed, Refused
from dhbe.records import Record

Identifier = Annotated[str, Field(pattern="^[0-9a-f]{12}$")]


class CaseRecord(BaseModel):
    """The result of a case: the record of its run, or its error, with its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    id: Identifier
    """Of the case's content."""
    code: Identifier
    """Version of the code (see `code`)."""
    name: str
    work: str
    settings: dict[str, Any]
    needs: list[Identifier]
    error: str | None = None
    """Why there is no result; None if there is one."""
    record: Record | None = None
    """The record of the run, if the case is one."""
    found: dict[str, Any] = {}
    """Other results by name."""
    pictures: list[str] = []
    """Picture files beside this one, `STEM.NAME`."""
    seconds: Annotated[float, Field(ge=0)]
    device: str
    versions: dict[str, str]
    finished: str


@dataclass(frozen=True)
class Outcome:
    """What a worker returns."""

    record: CaseRecord
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files for the cases that need this one, such as weights."""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """Pictures to be stored beside the record."""


@dataclass(frozen=True)
class Store:
    """Folders of records, which are kept, and of files for other cases, which can be reproduced."""

    records: Path
    work: Path

    @contextmanager
    def held(self) -> Iterator[None]:
        """Locks the folders for one sweep.

        Raises:
            Refused: Another sweep holds them.
            Failed: They cannot be made.
        """
        try:
            for folder in (self.records, self.work):
                folder.mkdir(parents=True, exist_ok=True)
            with files.held(self.work / ".lock") as ours:
                if not ours:
                    raise Refused(f"another sweep is working in {self.work}: wait for it, or give another --work")
                yield
        except OSError as error:
            raise Failed(f"cannot write {error.filename}: {(error.strerror or 'failed').lower()}") from error

    def read(self, case: Case) -> CaseRecord | None:
        """The record of a case; None if it never ran."""
        path = self.records / f"{case.stem}.json"
        return read(path) if path.exists() else None

    def done(self, case: Case, code: str | None) -> bool:
        """Whether a case has a result from this version of the code, or from any if None."""
        found = self.read(case)
        return found is not None and found.error is None and code in (None, found.code)

    def handed(self, case: Case, code: str | None) -> dict[str, bytes] | None:
        """Files of a finished case for others; None if they are missing, or of another version."""
        folder = self.work / case.id
        try:
            told = json.loads((folder / "handed.json").read_text())
            if code not in (None, told["code"]):
                return None
            return {name: (folder / name).read_bytes() for name in told["files"]}
        except (OSError, ValueError, KeyError):
            return None

    def keep(self, case: Case, outcome: Outcome) -> None:
        """Writes a result, the record last; an earlier result, say from a worker presumed dead, is kept."""
        if self.done(case, outcome.record.code) and (not outcome.files or self.handed(case, outcome.record.code)):
            return
        if outcome.files:
            folder = self.work / case.id
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in outcome.files.items():
                files.write(folder / name, content)
            told = {"code": outcome.record.code, "files": sorted(outcome.files)}
            files.write(folder / "handed.json", json.dumps(told))
        for name, content in outcome.pictures.items():
            files.write(self.records / f"{case.stem}.{name}", content)
        files.write(self.records / f"{case.stem}.json", json.dumps(outcome.record.model_dump(), indent=1) + "\n")


def read(path: Path) -> CaseRecord:
    """Reads the record of a case.

    Raises:
        Refused: It is no such record.
    """
    try:
        return CaseRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise Refused(f"{path} is not a record of a case ({said}): delete it to run the case again") from error
