"""The metadata that dhbe writes into the header of a safetensors file; whoever wrote a file may have made it up."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from dhbe import checkpoint, files
from dhbe.errors import Refused

KEY = "dhbe"
"""Where it stands in the header."""

Side = Annotated[int, Field(ge=1, le=1024)]


class Label(BaseModel):
    """The metadata in files written by dhbe. It is read from untrusted files too: data, never code."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    arch: str
    classes: int = Field(ge=2, le=100_000)
    input: tuple[Side, Side, Side]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    names: tuple[str, ...] = ()
    weights: str | None = None
    output: str | None = None


def read(path: Path) -> Label | None:
    """The label in a file; None if there is none that dhbe could have written."""
    try:
        with files.opened(path) as file:
            if int.from_bytes(file.read(8), "little") > checkpoint.LARGEST_HEADER:
                return None
        with safe_open(path, framework="pt") as file:
            return Label.model_validate(json.loads((file.metadata() or {})[KEY]))
    except (Refused, SafetensorError, OSError, KeyError, ValueError, RecursionError, ValidationError):
        return None  # not written by dhbe
