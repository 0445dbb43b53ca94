"""The classifier: maps pixels in [0, 1] to logits, whatever the vendor's network expects and returns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dhbe.errors import Refused

SMALLEST_PROBABILITY = 1e-12  # log of a softmax output that underflowed to 0 stays finite


class Classifier(nn.Module):
    """A network with a uniform interface: pixels in [0, 1] in, logits out; normalisation happens inside.

    The network may return logits alone or among other tensors: see `logits_in`. For a network that ends in softmax, the
    logits are its log-probabilities, which equal logits up to a constant.

    Args:
        network: The vendor's module, which takes normalised images [n, c, h, w]. It is not copied.
        shape: Image shape (channels, height, width).
        classes: Number of classes.
        mean: Mean of each channel over pixels in [0, 1], or one number for all.
        std: Standard deviation of each channel in the same unit, or one number for all; positive.
        softmax: Whether the network returns probabilities instead of logits.
        output: Which of several outputs holds the logits, by number or name; None if only one can.
        contiguous: Whether the network's code requires images and weights in contiguous memory format.

    Raises:
        Refused: Mean or std do not match the channels, or have invalid values.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        shape: tuple[int, int, int],
        classes: int,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        softmax: bool = False,
        output: str | None = None,
        contiguous: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.shape = shape
        self.classes = classes
        self.softmax = softmax
        self.output = output
        self.contiguous = contiguous
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, shape[0]):
                raise Refused(
                    f"--{name} has {len(values)} values, the images have {shape[0]} channels: give 1 or {shape[0]}"
                )
        if min(std) <= 0:
            raise Refused(f"--std must be positive, not {min(std):g}")
        if max(*mean, *std) > 1:
            asked, meant = (
                " ".join(f"--{name} {' '.join(f'{x / unit:.4g}' for x in values)}" for name, values in (("mean", mean), ("std", std)))
                for unit in (1, 255)
            )  # fmt: skip
            raise Refused(f"{asked} is in units of 0..255, but pixels are in [0, 1] here: give {meant}")
        # Not persistent: a state dict holds the vendor's tensors only.
        for name, values in (("mean", mean), ("std", std)):
            column = torch.tensor(values, dtype=torch.float32).expand(shape[0]).reshape(1, -1, 1, 1).clone()
            self.register_buffer(name, column, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [n, classes] (float32) of pixels [n, c, h, w] in [0, 1]."""
        return self.logits(self.normalise(pixels))

    def logits(self, normalised: Tensor) -> Tensor:
        """Logits [n, classes] (float32) of normalised images [n, c, h, w]."""
        order = torch.contiguous_format if self.contiguous else torch.preserve_format
        answer = self.network(normalised.clone(memory_format=order))  # a copy: a vendor's code may modify it in place
        if len(normalised) == 1 and isinstance(answer, Tensor) and answer.ndim == 1:  # the code squeezed it
            answer = answer.unsqueeze(0)
        output = logits_in(answer, self.classes, self.output).float()
        return output.clamp_min(SMALLEST_PROBABILITY).log() if self.softmax else output

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalises pixels [n, c, h, w] in [0, 1]."""
        return (pixels - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return images * self.std + self.mean


def logits_in(output: object, classes: int | None = None, which: str | None = None) -> Tensor:
    """Finds the logits in a network's output: a tensor, or a tuple, list, dict or object with tensors.

    An entry called ``logits`` takes precedence over the only tensor [n, classes].

    Args:
        output: What the network returned.
        classes: Number of classes; None if not yet known.
        which: Number or name of the logits among several outputs; None if only one tensor can be the logits.

    Raises:
        Refused: The output has no tensor [n, classes], or several.
    """
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    parts = _parts(output)
    if which is not None:
        chosen = {**dict(zip(map(str, range(len(parts))), parts.values(), strict=True)), **parts}.get(which)
        if chosen is None:
            raise Refused(
                f"the network has no output {which!r}: give one of {', '.join(parts)[:200] or 'none'} to --output"
            )
        return chosen
    if "logits" in parts and parts["logits"].ndim == 2:
        return parts["logits"]
    matrices = {name: part for name, part in parts.items() if part.ndim == 2}
    fitting = {name: part for name, part in matrices.items() if part.shape[1] == classes} or matrices
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    shapes = ", ".join(f"{name}: {list(part.shape)}" for name, part in list(parts.items())[:8])
    if not fitting:
        found = f"tensors of shape {shapes}" if parts else "no tensor of logits"
        raise Refused(f"the network returns {found}; it must return logits [n, classes], alone or among others")
    raise Refused(
        f"the network returns several outputs that may be the logits ({shapes}): add --output with the right one"
    )


def _parts(output: object) -> dict[str, Tensor]:
    """The tensors in a network's output, by name or number."""
    if isinstance(output, Tensor):
        named: dict[str, object] = {"0": output}
    elif isinstance(output, dict):
        named = {str(key): value for key, value in output.items()}
    elif isinstance(output, tuple | list):
        fields = getattr(output, "_fields", range(len(output)))
        named = {str(name): value for name, value in zip(fields, output, strict=False)}
    else:
        named = {"logits": getattr(output, "logits", None)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets eval mode inside and restores the mode of each module on exit, as modes may differ between modules."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
