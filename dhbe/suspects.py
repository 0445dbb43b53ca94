"""Loads a classifier from an untrusted file; settings are given, inferred from the tensors, or asked for."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from dhbe import checkpoint, claims, files, foreign, formats, look_alikes, networks
from dhbe.checkpoint import State
from dhbe.classifier import Classifier, evaluating, logits_in
from dhbe.data import NORMALISATION, Shape
from dhbe.errors import Refused
from dhbe.matching import show
from dhbe.networks import Guess
from dhbe.records import ModelInfo

LABEL = "dhbe"
"""Key of our metadata in the header of a safetensors file."""

VARIES = (
    "the network's output differs each time for the same images (dropout that stays on in eval mode, noise, or a counter in its "
    "code), and so may the results: switch that off if it is not intended"
)
"""Note about a network that is not deterministic."""

SIDE = 32
"""Default side of the images in pixels."""

CLAIMED_SIDE = 256
"""Largest image side in pixels accepted from a file's label; larger images may need gigabytes, so the user must confirm."""

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


@dataclass(frozen=True, eq=False)
class Suspect:
    """A classifier loaded from a file, in eval mode on the CPU, or passed as a module."""

    classifier: Classifier
    state: State
    info: ModelInfo
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    """The files it was read from: the model's, files beside it, and the vendor's code."""
    given: bool = False
    """Whether the user gave the normalisation, which then takes precedence."""
    labelled: bool = False
    """Whether the normalisation comes from the file's own label, and not from the user."""

    @cached_property
    def contradiction(self) -> str | None:
        """How the BatchNorm statistics contradict the normalisation; None if they do not."""
        found = claims.contradiction(self.classifier)
        if found is None:
            return None
        best, used = found
        said = "in its own label" if self.labelled else "in use"
        other = (
            f"its BatchNorm statistics fit {best.option} ({best.distance:.2f}) better than the mean and standard deviation "
            f"{said} ({used:.2f}; 0 is a perfect fit)"
        )
        if self.given:
            return f"{other}; these were given and are used"
        return f"{other}, and with wrong ones a model responds to no trigger: give {best.option}, or --mean auto"

    @cached_property
    def unusable(self) -> str | None:
        """Why the model cannot be judged, if its output hardly depends on the image; else None.

        Also None if another normalisation would fix that.
        """
        if self.contradiction or claims.variety(self.classifier) >= claims.SAME:
            return None
        return (
            "the model's output is nearly the same for every image, like that of an untrained network or with wrong input: "
            "check the weights, --arch, --mean and --std"
        )

    @property
    def unsure(self) -> str | None:
        """`contradiction`, if the normalisation was assumed, so that finding nothing means little; else None."""
        return None if self.given else self.contradiction

    @property
    def notes(self) -> tuple[str, ...]:
        """Everything that the user should know before using it, one line each."""
        return (*self.warnings, *filter(None, (self.contradiction, self.unusable)))


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    classes: int | None = None,
    shape: Shape | None = None,
    mean: Sequence[float] | str | None = None,
    std: Sequence[float] | str | None = None,
    weights: str | None = None,
    output: str | None = None,
) -> Suspect:
    """Loads a suspect model; nothing in its file is executed. Assumptions become warnings.

    Args:
        path: A .safetensors file, a file of `torch.save` that holds tensors only, or another format of `formats`.
        arch: Architecture (see `networks.build`); None infers it from the tensors, if they are unambiguous.
        classes: Number of classes; None likewise.
        shape: Image shape (channels, height, width); None means the file's label, or the architecture's default.
        mean: Mean of each channel, pixels in [0, 1], with which the network's input is normalised; or the name of a data
            set, such as `imagenet`, whose standard deviation is used too unless `std` is given; or `auto`: the constants
            that fit the BatchNorm statistics best. None means the file's label, or the architecture's default.
        std: The standard deviation, likewise, but not `auto`.
        weights: Which of several state dicts in the file; None means the only one, or an average (EMA) of it.
        output: Which of several outputs holds the logits; None means the only one that can.

    Raises:
        Refused: The file, the architecture or the numbers do not fit together, or must be given.
    """
    path = Path(path)
    label = _label(path)
    weights, output = weights or (label.weights if label else None), output or (label.output if label else None)
    state = formats.read(path, weights)
    shape = shape or (state.container.shape if state.container else None)
    if label and not shape and max(label.input[1:]) > CLAIMED_SIDE:
        claim = "x".join(map(str, label.input))
        raise Refused(f"{foreign.name(path)} claims an image shape of {claim}: add --input {claim} to confirm it")
    told = None if label and label.arch in networks.ZOO else formats.described(path)
    auto, (mean, std) = mean == "auto", constants(mean, std)
    given = auto or (mean is not None and std is not None)
    warnings: list[str] = []
    guess, asked = networks.infer(state.plain), arch is not None
    arch = arch or (told.arch if told else label.arch if label and label.arch in networks.ZOO else guess.arch)
    classes = classes or guess.classes or (told.classes if told else label.classes if label else None)
    if arch is None and not guess.alike:
        raise Refused(
            f"the architecture cannot be inferred from the tensors of {foreign.name(path)}: add --arch (a built-in name: "
            f"{', '.join(networks.ZOO)}; torchvision:NAME, timm:NAME, or the vendor's file.py:function)"
        )
    if classes is None:
        raise Refused(
            f"the number of classes cannot be inferred from the tensors of {foreign.name(path)}: add --classes N"
        )
    usual = _usual(arch, told) if arch and not label else None
    shape, mean, std = _fed(arch, state, (shape, mean, std), label, usual, [] if auto else warnings)
    for name, values in (("mean", mean), ("std", std)):
        if not all(x == 0 or 1e-6 <= abs(x) <= 1e6 for x in values):  # also NaN; `Classifier` checks the rest
            raise Refused(
                f"--{name} {' '.join(f'{x:g}' for x in values)}: no normalisation of pixels in [0, 1]; correct the numbers"
            )
    if arch is None:
        arch = _told_apart(guess, state, shape, classes, mean, std)
    if not asked and not label and not told:
        warnings.insert(0, f"taken for {arch}: {networks.stem(arch)}")
    if told and not asked:
        most = checkpoint.SLACK * sum(tensor.numel() for tensor in state.tensors.values())
        network = told.build(classes, shape, most)
    else:
        network = networks.build(arch, classes, shape)
    state = checkpoint.load_into(network, state, weights)
    softmax = networks.probe(network, shape, classes, output)
    if state.container:
        state.container.check(network, shape)
    varies = arch not in networks.ZOO and not networks.repeats(network, shape)
    contiguous = arch not in networks.ZOO and (varies or not networks.takes_channels_last(network, shape))
    classifier = Classifier(
        network, shape=shape, classes=classes, mean=mean, std=std, softmax=softmax, output=output, contiguous=contiguous
    ).eval()
    claims.check_finite(classifier)
    if auto:
        classifier, said = fitted(classifier)
        mean, std = (tuple(x.flatten().tolist()) for x in (classifier.mean, classifier.std))
        warnings.append(said)
    warnings[:0] = state.notes
    if softmax:
        warnings.append("the network returns probabilities; their logarithms are used as logits")
    if varies:
        warnings.append(VARIES)
    elif contiguous:
        warnings.append("the network's code requires contiguous tensors, which are somewhat slower")
    code = vendor_code(arch)
    if code:
        warnings.append(f"the vendor's code {code} was run, as requested by --arch")
    names = tuple(map(show, label.names if label else told.names if told else ()))
    info = ModelInfo(
        path=str(path), sha256=state.sha256, arch=arch, classes=classes, input=shape, mean=tuple(mean), std=tuple(std),
        softmax=softmax, code=code, weights=weights, output=output, names=names,
    )  # fmt: skip
    read = (*formats.sources(path), *([Path(code.rpartition(":")[0])] if code else []))
    labelled = label is not None and not given
    return Suspect(classifier, state, info, tuple(warnings), read, given, labelled)


def vendor_code(arch: str) -> str | None:
    """The vendor's code that an architecture names; None if it is built-in or from a library."""
    return arch if ":" in arch and not arch.startswith(("torchvision:", "timm:", "transformers:")) else None


def save(path: Path, network: nn.Module, like: State, info: ModelInfo) -> None:
    """Writes a network's weights with exactly the keys, shapes and dtypes of `like`, and a label that `load` reads.

    Raises:
        Failed: A weight is not finite, or the file cannot be written.
    """
    told = info.model_dump()
    if not any(f".{info.weights}." in f".{key}" for key in like.tensors):
        told["weights"] = None  # this file holds a single state dict
    label = Label.model_validate(told)
    checkpoint.save(path, network.state_dict(), like, {LABEL: label.model_dump_json()})


def constants(
    mean: Sequence[float] | str | None, std: Sequence[float] | str | None
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Resolves names of data sets to mean and standard deviation; `auto` and None give None.

    Raises:
        Refused: There is no such name, or `auto` is combined with a standard deviation.
    """
    for name, value in (("mean", mean), ("std", std)):
        if isinstance(value, str) and value not in NORMALISATION and not (value == "auto" and name == "mean"):
            raise Refused(
                f"--{name} {value}: give numbers, or one of {', '.join(NORMALISATION)}{', auto' * (name == 'mean')}"
            )
    if mean == "auto" and std is not None:
        raise Refused("--mean auto determines both constants: omit --std")
    if mean == "auto":
        return None, None
    if isinstance(mean, str) and std is None:
        return NORMALISATION[mean]
    return (
        NORMALISATION[mean][0] if isinstance(mean, str) else mean,
        NORMALISATION[std][1] if isinstance(std, str) else std,
    )


def fitted(classifier: Classifier) -> tuple[Classifier, str]:
    """A classifier with the normalisation that fits its BatchNorm statistics best, and a note about it.

    Raises:
        Refused: It has no BatchNorm layers.
    """
    tried = claims.fits(classifier)
    if not tried:
        raise Refused("--mean auto needs a network with BatchNorm layers: give --mean and --std as numbers")
    best, second = tried[:2]
    found = Classifier(
        classifier.network, shape=classifier.shape, classes=classifier.classes, mean=best.mean, std=best.std,
        softmax=classifier.softmax, output=classifier.output, contiguous=classifier.contiguous,
    ).to(classifier.mean.device)  # fmt: skip
    found.train(classifier.training)
    return found, (
        f"--mean auto: {best.option}, which fits the BatchNorm statistics best ({best.distance:.2f}; next "
        f"{second.option}, {second.distance:.2f}; 0 is a perfect fit)"
    )


def of(
    network: nn.Module | Suspect,
    shape: Shape | None,
    mean: Sequence[float] | str | None = None,
    std: Sequence[float] | str | None = None,
    output: str | None = None,
) -> Suspect:
    """Wraps a module as a suspect; a `Suspect` is returned unchanged.

    Args:
        network: A module that takes normalised images.
        shape: Image shape (channels, height, width).
        mean: Mean of each channel with which the input is normalised, pixels in [0, 1]; or a name or `auto` as in `load`;
            None means 0.
        std: The standard deviation, likewise; None means 1.
        output: Which of several outputs holds the logits, by number or name.

    Raises:
        Refused: The shape is missing, or the module is not a classifier of such images.
    """
    if isinstance(network, Suspect):
        return network
    if shape is None:
        raise Refused("the image shape of the module is missing: give input_shape, such as input_shape=(3, 32, 32)")
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    with evaluating(network):
        with torch.no_grad():
            classes = logits_in(network(torch.zeros(2, *shape, device=device)), which=output).shape[1]
        softmax = networks.probe(network, shape, classes, output)
        varies = not networks.repeats(network, shape)
        contiguous = varies or not networks.takes_channels_last(network, shape)
    auto, (mean, std) = mean == "auto", constants(mean, std)
    given, mean, std = auto or (mean is not None and std is not None), mean or (0.0,), std or (1.0,)
    classifier, said = Classifier(
        network, shape=shape, classes=classes, mean=mean, std=std, softmax=softmax, output=output, contiguous=contiguous
    ).to(device), ""  # fmt: skip
    if auto:
        classifier, said = fitted(classifier)
        mean, std = (tuple(x.flatten().tolist()) for x in (classifier.mean, classifier.std))
    claims.check_finite(classifier)
    info = ModelInfo(
        path=None, sha256=_fingerprint(network), arch=type(network).__name__, classes=classes, input=shape,
        mean=tuple(mean), std=tuple(std), softmax=softmax, output=output,
    )  # fmt: skip
    state = State(dict(network.state_dict()), "", "", "")
    notes = (*([said] if said else []), *([VARIES] if varies else []))
    return Suspect(classifier, state, info, notes, given=given)


def _fingerprint(network: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of a network's tensors."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _usual(arch: str, told: formats.Described | None) -> networks.Usual | None:
    """The usual input of an architecture, from the folder's own configuration or else from the library."""
    if told is None:
        return networks.usual(arch)
    library = networks.usual(arch)
    mean, std = told.mean or (library.mean if library else (0.5,)), told.std or (library.std if library else (0.5,))
    return networks.Usual(told.shape, mean, std, told.source)


def _fed(
    arch: str | None,
    state: State,
    given: tuple[Shape | None, Sequence[float] | None, Sequence[float] | None],
    label: Label | None,
    usual: networks.Usual | None,
    warnings: list[str],
) -> tuple[Shape, Sequence[float], Sequence[float]]:
    """Shape, mean and standard deviation of the images; assumptions are added to `warnings`."""
    shape, mean, std = given
    if label:
        if mean is None or std is None:
            warnings.append("--mean or --std not given: taken from the file's own label")
        return shape or label.input, mean or label.mean, std or label.std
    channels = networks.channels(state.plain)
    if shape is None:
        side = 64 if arch and arch.endswith("-64") else SIDE
        shape = (channels or usual.shape[0], *usual.shape[1:]) if usual else (channels or 3, side, side)
        warnings.append(
            f"no --input given: assuming images of {'x'.join(map(str, shape))}{f', as in {usual.source}' if usual else ''}"
        )
    if mean and usual and "transform_input" in usual.source:
        warnings.append(f"the network does not normalise its input itself; {usual.source}")
    names = " or ".join(f"--{name}" for name, values in (("mean", mean), ("std", std)) if values is None)
    if usual and names:
        wide = [
            values if len(values) == shape[0] else (sum(values) / len(values),) for values in (usual.mean, usual.std)
        ]
        mean, std = mean or wide[0], std or wide[1]
        numbers = "; ".join(" ".join(f"{x:.3g}" for x in values) for values in (mean, std))
        warnings.append(f"no {names} given: normalised by {numbers}, as in {usual.source}")
    elif mean is None and std is None:
        warnings.append("no --mean or --std given: assuming that the network expects pixels in [0, 1]")
    elif std is None:
        warnings.append("--mean without --std: the mean is subtracted, and the standard deviation is taken as 1")
    elif mean is None:
        warnings.append("--std without --mean: the mean is taken as 0")
    return shape, mean or (0.0,), std or (1.0,)


def _told_apart(
    guess: Guess, state: State, shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]
) -> str:
    """Chooses one of several architectures with the same tensors by their BatchNorm statistics."""
    found = look_alikes.distances(guess.alike, state, shape, classes, mean, std)
    arch = look_alikes.told(found)
    if arch is None:
        offered = " or ".join(f"--arch {each} ({networks.stem(each)})" for each in guess.alike)
        raise Refused(f"several architectures fit the tensors: add {offered}")
    return arch


def _label(path: Path) -> Label | None:
    try:
        with files.opened(path) as file:
            if int.from_bytes(file.read(8), "little") > checkpoint.LARGEST_HEADER:
                return None
        with safe_open(path, framework="pt") as file:
            return Label.model_validate(json.loads((file.metadata() or {})[LABEL]))
    except (Refused, SafetensorError, OSError, KeyError, ValueError, RecursionError, ValidationError):
        return None  # not written by dhbe
