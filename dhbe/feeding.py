"""How images are fed to a network: their shape and normalisation, as given, labelled, usual for the architecture, or assumed."""

from collections.abc import Sequence

from dhbe import claims, formats, matching, networks
from dhbe.checkpoint import State
from dhbe.classifier import Classifier
from dhbe.data import NORMALISATION, Shape
from dhbe.errors import Refused
from dhbe.label import Label

SIDE = 32
"""Default side of the images in pixels."""


def constants(
    mean: float | Sequence[float] | str | None, std: float | Sequence[float] | str | None
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Resolves names of data sets, and one number for all channels, to mean and standard deviation; `auto` and None give None.

    Raises:
        Refused: There is no such name, or `auto` is combined with a standard deviation.
    """
    mean, std = ((float(each),) if isinstance(each, int | float) else each for each in (mean, std))
    for name, value in (("mean", mean), ("std", std)):
        if isinstance(value, str) and value not in NORMALISATION and not (value == "auto" and name == "mean"):
            raise Refused(
                f"--{name}={value}: give numbers, or one of {', '.join(NORMALISATION)}{', auto' * (name == 'mean')}"
            )
    if mean == "auto" and std is not None:
        raise Refused("--mean=auto determines both constants: omit --std")
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
        raise Refused("--mean=auto needs a network with BatchNorm layers: give --mean and --std as numbers")
    best, second = tried[:2]
    found = Classifier(
        classifier.network, shape=classifier.shape, classes=classifier.classes, mean=best.mean, std=best.std,
        softmax=classifier.softmax, output=classifier.output, contiguous=classifier.contiguous,
    ).to(classifier.mean.device)  # fmt: skip
    found.train(classifier.training)
    return found, (
        f"--mean=auto: {best.option}, which fits the BatchNorm statistics best ({best.distance:.2f}; next "
        f"{second.option}, {second.distance:.2f}; 0 is a perfect fit)"
    )


def usual(arch: str, told: formats.Described | None) -> networks.Usual | None:
    """The usual input of an architecture, from the folder's own configuration or else from the library."""
    if told is None:
        return networks.usual(arch)
    library = networks.usual(arch)
    mean, std = told.mean or (library.mean if library else (0.5,)), told.std or (library.std if library else (0.5,))
    return networks.Usual(told.shape, mean, std, told.source)


def fed(
    arch: str | None,
    state: State,
    given: tuple[Shape | None, Sequence[float] | None, Sequence[float] | None],
    label: Label | None,
    usual: networks.Usual | None,
    warnings: list[str],
) -> tuple[Shape, Sequence[float], Sequence[float]]:
    """Shape, mean and standard deviation of the images; assumptions are added to `warnings`.

    A vendor's code may use the constants among the file's tensors itself; a library's network does not.
    """
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
    own = None if arch and networks.is_code(arch) else matching.normalisation(state.tensors)
    if own:
        source, *constants = own
        numbers = "; ".join(" ".join(f"{x:.3g}" for x in values.tolist()) for values in constants)
        used = "the given constants are used" if not names else f"no {names} given: taken from there"
        warnings.append(f"the file holds its own normalisation ({numbers}, in {matching.show(source)}): {used}")
        mean, std = mean or tuple(constants[0].tolist()), std or tuple(constants[1].tolist())
    elif usual and names:
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
