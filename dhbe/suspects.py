"""From a file of a stranger to a classifier: what is told, what is guessed from the tensors, what must be asked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from dhbe import checkpoint, foreign, networks
from dhbe.checkpoint import State
from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.errors import Refused
from dhbe.records import ModelInfo

LABEL = "dhbe"
"""Key of our own lines in the header of a safetensors file."""

SHAPE: Shape = (3, 32, 32)
"""Image shape where neither the user nor the file says it."""


CLAIMED_SIDE = 256
"""Pixels; larger images take gigabytes at the first try, and are not tried because a file says so."""

Side = Annotated[int, Field(ge=1, le=1024)]


class Label(BaseModel):
    """What a file that we wrote says of itself. It is read from strangers' files too: data, never code."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    arch: str
    classes: int = Field(ge=2, le=100_000)
    input: tuple[Side, Side, Side]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Suspect:
    """A classifier out of a file, in eval mode on the CPU."""

    classifier: Classifier
    state: State
    info: ModelInfo
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    """What it was read from: the model's file, and the vendor's code."""
    claimed: bool = False
    """Whether nothing but the file's own label tells how images are normalised."""


def load(
    path: Path,
    *,
    arch: str | None = None,
    classes: int | None = None,
    shape: Shape | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Suspect:
    """Loads a suspect model; nothing in its file is executed.

    Args:
        path: .safetensors, or a file of `torch.save` that holds tensors only.
        arch: Architecture (see `networks.build`); None takes it from the tensors, where they leave no doubt.
        classes: Number of classes; None likewise.
        shape: Image shape (channels, height, width); None takes the file's label, or 3x32x32.
        mean: Mean that the network's input is normalised with; None takes the file's label, or 0.
        std: The standard deviation likewise, or 1.

    Raises:
        Refused: The file, the architecture or the numbers do not fit together.
    """
    state = checkpoint.read(path)
    label = _label(path)
    warnings = []
    if label and not shape and max(label.input[1:]) > CLAIMED_SIDE:
        claim = "x".join(map(str, label.input))
        raise Refused(f"{foreign.name(path)} says that its images are {claim}: add --input {claim} if they are")
    shape = shape or (label.input if label else SHAPE)
    guess = networks.infer(state.plain, shape)
    arch = arch or (label.arch if label and label.arch in networks.ZOO else guess.arch)
    classes = classes or guess.classes or (label.classes if label else None)
    if arch is None:
        raise Refused(
            f"the tensors of {foreign.name(path)} do not tell their architecture: add --arch (a name of the zoo: "
            f"{', '.join(networks.ZOO)}; torchvision:NAME, timm:NAME, or the vendor's file.py:function)"
        )
    if classes is None:
        raise Refused(f"the tensors of {foreign.name(path)} do not tell the number of classes: add --classes N")
    if (mean is None or std is None) and label is None:
        warnings.append("no --mean or --std given: the network is taken to expect pixels in [0, 1] as they are")
    claimed = label is not None and (mean is None or std is None)
    if claimed:
        warnings.append("--mean or --std not given: taken from what the file says of itself")
    mean = mean or (label.mean if label else (0.0,))
    std = std or (label.std if label else (1.0,))
    for name, values in (("mean", mean), ("std", std)):
        if not all(x == 0 or 1e-6 <= abs(x) <= 1e6 for x in values):  # NaN too; the classifier judges the rest
            raise Refused(f"--{name} {' '.join(f'{x:g}' for x in values)}: pixels in [0, 1] are not normalised by that")
    network = networks.build(arch, classes, shape)
    checkpoint.load_into(network, state)
    softmax = networks.probe(network, shape, classes)
    classifier = Classifier(network, shape=shape, classes=classes, mean=mean, std=std, softmax=softmax).eval()
    if softmax:
        warnings.append("the network returns probabilities; their logarithms are used as logits")
    code = vendor_code(arch)
    if code:
        warnings.append(f"the vendor's code {code} was run, as --arch asked")
    info = ModelInfo(
        path=str(path), sha256=state.sha256, arch=arch, classes=classes, input=shape,
        mean=tuple(mean), std=tuple(std), softmax=softmax, code=code,
    )  # fmt: skip
    read = (path, Path(code.rpartition(":")[0])) if code else (path,)
    return Suspect(classifier, state, info, tuple(warnings), read, claimed)


def vendor_code(arch: str) -> str | None:
    """The vendor's code that an architecture names, if it is neither of the zoo nor of a library."""
    return arch if ":" in arch and not arch.startswith(("torchvision:", "timm:")) else None


def save(path: Path, network: nn.Module, like: State, info: ModelInfo) -> None:
    """Writes a network's weights with the very keys, shapes and dtypes of `like`, and a label that `load` reads.

    Raises:
        Failed: A weight is not finite, or the file cannot be written.
    """
    label = Label.model_validate(info.model_dump())
    checkpoint.save(path, network.state_dict(), like, {LABEL: label.model_dump_json()})


def _label(path: Path) -> Label | None:
    try:
        with safe_open(path, framework="pt") as file:
            return Label.model_validate(json.loads((file.metadata() or {})[LABEL]))
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError, ValidationError):
        return None  # not a file of ours
