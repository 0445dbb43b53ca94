"""Networks: built-in architectures, third-party ones, and inference of the architecture from weights."""

import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from dhbe.classifier import logits_in
from dhbe.errors import Refused
from dhbe.networks.external import (
    SINGLE,
    Usual,
    from_code,
    from_timm,
    from_torchvision,
    guarded,
    usual_of_timm,
    usual_of_torchvision,
)
from dhbe.networks.resnet import ResNet
from dhbe.networks.wide_resnet import WideResNet

COUNTER = "num_batches_tracked"  # of BatchNorm; older files lack it

ZOO: dict[str, Callable[..., nn.Module]] = {
    "resnet8": partial(ResNet, (1, 1, 1), 16),
    "resnet20": partial(ResNet, (3, 3, 3), 16),
    "resnet18": partial(ResNet, (2, 2, 2, 2), 64),
    "resnet34": partial(ResNet, (3, 4, 6, 3), 64),
    "resnet18-w16": partial(ResNet, (2, 2, 2, 2), 16),
    "resnet18-w32": partial(ResNet, (2, 2, 2, 2), 32),
    "resnet18-64": partial(ResNet, (2, 2, 2, 2), 64, pool=True),
    "resnet34-64": partial(ResNet, (3, 4, 6, 3), 64, pool=True),
    "wrn16-1": partial(WideResNet, 16, 1),
    "wrn16-2": partial(WideResNet, 16, 2),
    "wrn40-1": partial(WideResNet, 40, 1),
    "wrn40-2": partial(WideResNet, 40, 2),
}
"""Functions ``(classes, channels=3)`` that return an untrained network for normalised images; ``-64`` is for 64 px."""


@dataclass(frozen=True)
class Guess:
    """What the keys and shapes of weights determine; None where they do not."""

    arch: str | None
    classes: int | None
    alike: tuple[str, ...] = ()
    """The candidates, if several architectures have exactly these tensors."""


def build(arch: str, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """An untrained network.

    Args:
        arch: A name in `ZOO`, ``torchvision:NAME``, ``timm:NAME``, or the vendor's code as ``path/to/file.py:function``
            or ``package.module:function``, which is run.
        classes: Number of classes.
        shape: Image shape (channels, height, width).

    Raises:
        Refused: There is no such network, or it cannot be built.
    """
    if classes == 1:
        raise Refused(SINGLE)
    if classes < 2 or min(shape) < 1:
        raise Refused(f"a classifier needs at least 2 classes and images of 1x1x1, not {classes} and {shape}")
    if arch in ZOO:
        return ZOO[arch](classes, shape[0])
    place, _, name = arch.rpartition(":")
    if not (place and name):
        near = difflib.get_close_matches(arch, ZOO, n=1)
        raise Refused(
            f"unknown architecture {arch!r}{f' (did you mean {near[0]}?)' if near else ''}: give one of {', '.join(ZOO)}, "
            "or torchvision:NAME, timm:NAME, path/to/file.py:function, package.module:function"
        )
    if place == "torchvision":
        return from_torchvision(name, classes, shape[0])
    if arch.startswith("timm:"):
        return from_timm(arch.removeprefix("timm:"), classes, shape)
    return from_code(place, name, classes)


def is_code(arch: str) -> bool:
    """Whether an architecture names the vendor's code, and not a built-in network or a library's."""
    return ":" in arch and not arch.startswith(("torchvision:", "timm:", "transformers:"))


def usual(arch: str) -> Usual | None:
    """The default input of a library's network; None for networks that are not from a library."""
    if arch.startswith("torchvision:"):
        return usual_of_torchvision(arch.removeprefix("torchvision:"))
    if arch.startswith("timm:"):
        return usual_of_timm(arch.removeprefix("timm:"))
    return None


STEMS = ("conv1.weight", "conv_stem.weight", "features.0.weight", "features.0.0.weight", "patch_embed.proj.weight")
"""Names of the weights of first layers."""


def channels(tensors: Mapping[str, Tensor]) -> int | None:
    """The number of input channels, from the network's first kernel; None if it is not found."""
    stems = [tensors[name] for name in STEMS if name in tensors]
    return stems[0].shape[1] if stems and stems[0].ndim == 4 else None


def infer(tensors: Mapping[str, Tensor]) -> Guess:
    """Infers architecture and number of classes from a state dict, whose keys must have no wrappers' prefixes.

    ``resnet18`` and ``resnet18-64`` have the same tensors; then both are in `Guess.alike`.
    """
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items() if not key.endswith(COUNTER)}
    matrices = [shape for key, shape in found.items() if key.endswith("weight") and len(shape) == 2]
    # The last matrix is the classifier's, unless the file is sorted by name, so that its order means nothing.
    told = len(matrices) == 1 or (matrices and list(found) != sorted(found))
    classes = matrices[-1][0] if told else None
    stem = found.get("conv1.weight", ())
    if not classes or len(stem) != 4 or "fc.weight" not in found:
        return Guess(None, classes)
    fits = tuple(name for name in ZOO if found == _shapes(name, classes, stem[1]))
    return Guess(fits[0] if len(fits) == 1 else None, classes, fits if len(fits) > 1 else ())


def stem(arch: str) -> str:
    """A description of the stem of a built-in architecture, which tensors do not determine."""
    return "stem stride 1, max-pooling behind it" if arch.endswith("-64") else "stem stride 1, no max-pooling"


def probe(network: nn.Module, shape: tuple[int, int, int], classes: int, output: str | None = None) -> bool:
    """Tests `network` on four images of noise; leaves it in eval mode.

    Args:
        network: A network that takes normalised images [n, c, h, w].
        shape: Image shape (channels, height, width).
        classes: Number of classes that the output must have.
        output: Which of several outputs holds the logits.

    Returns:
        Whether the outputs are probabilities (not negative, each row sums to 1) instead of logits.

    Raises:
        Refused: The network fails on such images, or does not return finite logits [4, classes].
    """
    images, size = _noise(network, shape), "x".join(map(str, shape))
    with guarded(f"running the network on images of --input={size}"), torch.no_grad():
        answer = logits_in(network.eval()(images), classes, output).float()
    if answer.shape == (4, 1):
        raise Refused(SINGLE)
    if answer.shape != (4, classes):
        raise Refused(f"for 4 images the network returns {list(answer.shape)}, not [4, {classes}]: check --classes")
    if not answer.isfinite().all():
        raise Refused(
            f"the network returns NaN or infinite logits for noise of --input={size}: check --input and the weights"
        )
    sums = answer.sum(1)
    return classes > 1 and bool((answer >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def takes_channels_last(network: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Whether a network computes the same in channels-last memory format, which is faster.

    Code that flattens with ``view`` fails then, in eval or in training mode. The test uses a copy.

    Args:
        network: A network that works on contiguous images of `shape`.
        shape: Image shape (channels, height, width).
    """
    images = _noise(network, shape)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            with guarded("trying channels-last order"):
                trial = copy.deepcopy(network).eval()
                with torch.no_grad():
                    plain = _tensors(trial(images.clone()))
                    for parameter in trial.parameters():
                        if parameter.ndim == 4:
                            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
                    images = images.contiguous(memory_format=torch.channels_last)
                    turned = _tensors(trial(images.clone()))
                same = len(plain) == len(turned) and all(
                    torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max()))
                    for a, b in zip(plain, turned, strict=True)
                )
                trial.train()(images)
        except Refused:
            return False
    return same


def repeats(network: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Whether a network in eval mode gives the same output for the same images again; tested on a copy.

    Args:
        network: A network that takes images of `shape`.
        shape: Image shape (channels, height, width).
    """
    images = _noise(network, shape)
    elsewhere = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    with elsewhere, torch.no_grad(), guarded("running the network twice on the same images"):
        trial = copy.deepcopy(network).eval()
        first, second = (_tensors(trial(images.clone())) for _ in range(2))
    return all(
        torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max())) for a, b in zip(first, second, strict=True)
    )


def _tensors(output: object) -> list[Tensor]:
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
    return [part.float() for part in parts if isinstance(part, Tensor)]


def _noise(network: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    device = next((tensor.device for tensor in network.state_dict().values()), torch.device("cpu"))
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), device="cpu").to(device)


@cache
def _shapes(arch: str, classes: int, channels: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = ZOO[arch](classes, channels).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith(COUNTER)}
