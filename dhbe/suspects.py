"""Loads a classifier from an untrusted file; settings are given, inferred from the tensors, or asked for."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from dhbe import checkpoint, claims, feeding, foreign, formats, look_alikes, networks
from dhbe.checkpoint import State
from dhbe.classifier import Classifier, evaluating, logits_in
from dhbe.data import Shape
from dhbe.errors import Refused
from dhbe.flags import in_python
from dhbe.label import KEY, Label
from dhbe.label import read as read_label
from dhbe.matching import show
from dhbe.networks import Guess
from dhbe.records import ModelInfo

CLAIMED_SIDE = 256
"""Largest image side in pixels accepted from a file's label; larger images may need gigabytes, so the user must confirm."""

VARIES = (
    "the network's output differs each time for the same images (dropout that stays on in eval mode, noise, or a counter in its "
    "code), and so may the results: switch that off if it is not intended"
)
"""Note about a network that is not deterministic."""


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
        return f"{other}, and with wrong ones a model responds to no trigger: give {best.option}, or --mean=auto"

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
    def flagged(self) -> tuple[str, ...]:
        """Everything that the user should know before using it, one line each, with flags for the command line."""
        return (*self.warnings, *filter(None, (self.contradiction, self.unusable)))

    @property
    def notes(self) -> tuple[str, ...]:
        """The same, with parameters for whoever calls a function."""
        return tuple(map(in_python, self.flagged))


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    classes: int | None = None,
    input_shape: Shape | None = None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    weights: str | None = None,
    output: str | None = None,
) -> Suspect:
    """Loads a suspect model; nothing in its file is executed. Assumptions become warnings.

    Args:
        path: A .safetensors file, a file of `torch.save` that holds tensors only, or another format of `formats`.
        arch: Architecture (see `networks.build`); None infers it from the tensors, if they are unambiguous.
        classes: Number of classes; None likewise.
        input_shape: Image shape (channels, height, width); None means the file's label, or the architecture's default.
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
    label = read_label(path)
    weights, output = weights or (label.weights if label else None), output or (label.output if label else None)
    state = formats.read(path, weights)
    shape = input_shape or (state.container.shape if state.container else None)
    if label and not shape and max(label.input[1:]) > CLAIMED_SIDE:
        claim = "x".join(map(str, label.input))
        raise Refused(f"{foreign.name(path)} claims an image shape of {claim}: add --input={claim} to confirm it")
    told = None if label and label.arch in networks.ZOO else formats.described(path)
    auto, (mean, std) = mean == "auto", feeding.constants(mean, std)
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
            f"the number of classes cannot be inferred from the tensors of {foreign.name(path)}: add --classes"
        )
    usual = feeding.usual(arch, told) if arch and not label else None
    shape, mean, std = feeding.fed(arch, state, (shape, mean, std), label, usual, [] if auto else warnings)
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
    plain = Classifier(network, shape=shape, classes=classes, mean=mean, std=std, softmax=softmax, output=output).eval()
    classifier, notes = _tried(plain, known=arch in networks.ZOO, auto=auto)
    if auto:
        mean, std = (tuple(x.flatten().tolist()) for x in (classifier.mean, classifier.std))
    warnings[:0] = state.notes
    if softmax:
        warnings.append("the network returns probabilities; their logarithms are used as logits")
    warnings += notes
    code = vendor_code(arch)
    if code:
        warnings.append(f"the vendor's code {code} was run, as requested by --arch")
    names = tuple(map(show, label.names if label else told.names if told else ()))
    info = ModelInfo(
        path=str(path), sha256=state.sha256, arch=arch, classes=classes, input=shape,
        mean=tuple(mean), std=tuple(std), softmax=softmax, code=code, weights=weights, output=output, names=names,
    )  # fmt: skip
    read = (*formats.sources(path), *([Path(code.rpartition(":")[0])] if code else []))
    labelled = label is not None and not given
    return Suspect(classifier, state, info, tuple(warnings), read, given, labelled)


def vendor_code(arch: str) -> str | None:
    """The vendor's code that an architecture names; None if it is built-in or from a library."""
    return arch if networks.is_code(arch) else None


def save(path: Path, network: nn.Module, like: State, info: ModelInfo) -> None:
    """Writes a network's weights with exactly the keys, shapes and dtypes of `like`, and a label that `load` reads.

    Raises:
        Failed: A weight is not finite, or the file cannot be written.
    """
    told = info.model_dump()
    if not any(f".{info.weights}." in f".{key}" for key in like.tensors):
        told["weights"] = None  # this file holds a single state dict
    label = Label.model_validate(told)
    checkpoint.save(path, network.state_dict(), like, {KEY: label.model_dump_json()})


def of(
    network: nn.Module | Suspect,
    shape: Shape | None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
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
    auto, (mean, std) = mean == "auto", feeding.constants(mean, std)
    given, mean, std = auto or (mean is not None and std is not None), mean or (0.0,), std or (1.0,)
    plain = Classifier(network, shape=shape, classes=classes, mean=mean, std=std, softmax=softmax, output=output)
    classifier, notes = _tried(plain.to(device), known=False, auto=auto)
    if auto:
        mean, std = (tuple(x.flatten().tolist()) for x in (classifier.mean, classifier.std))
    info = ModelInfo(
        path=None, sha256=_fingerprint(network), arch=type(network).__name__, classes=classes, input=shape,
        mean=tuple(mean), std=tuple(std), softmax=softmax, output=output,
    )  # fmt: skip
    state = State(dict(network.state_dict()), "", "", "")
    return Suspect(classifier, state, info, notes, given=given)


def _tried(classifier: Classifier, *, known: bool, auto: bool) -> tuple[Classifier, tuple[str, ...]]:
    """The classifier in the memory format that its network takes and, if `auto`, with the best normalisation; and notes.

    Args:
        classifier: As it was built or given; it is changed.
        known: Whether the network is our own, which needs no trial.
        auto: Whether the normalisation is to be that which fits the BatchNorm statistics best.

    Raises:
        Refused: The network does not return finite logits, or `auto` has no BatchNorm statistics to go by.
    """
    network, shape, notes = classifier.network, classifier.shape, []
    if not known:
        varies = not networks.repeats(network, shape)
        classifier.contiguous = varies or not networks.takes_channels_last(network, shape)
        if varies:
            notes.append(VARIES)
        elif classifier.contiguous:
            notes.append("the network's code requires contiguous tensors, which are somewhat slower")
    if auto:
        classifier, said = feeding.fitted(classifier)
        notes.append(said)
    claims.check_finite(classifier)
    return classifier, tuple(notes)


def _fingerprint(network: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of a network's tensors."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _told_apart(
    guess: Guess, state: State, shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]
) -> str:
    """Chooses one of several architectures with the same tensors by their BatchNorm statistics."""
    found = look_alikes.distances(guess.alike, state, shape, classes, mean, std)
    arch = look_alikes.told(found)
    if arch is None:
        offered = " or ".join(f"--arch={each} ({networks.stem(each)})" for each in guess.alike)
        raise Refused(f"several architectures fit the tensors: add {offered}")
    return arch
