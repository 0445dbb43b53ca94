"""The classifier: pixels in [0, 1] go in, logits come out, whatever the vendor's network expects and returns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dhbe.errors import Refused

SMALLEST_PROBABILITY = 1e-12  # log of a softmax output that underflowed to 0 stays finite


class Classifier(nn.Module):
    """A network behind one door: pixels in [0, 1] in, logits out; normalisation happens inside.

    The network may return logits, a tuple or list (its last item), a dict with the key ``logits`` or an object with
    that attribute. A network that ends in softmax gives its log-probabilities, which are logits up to a constant.

    Args:
        network: The vendor's module; it takes normalised images [n, c, h, w]. It is used, not copied.
        shape: Image shape (channels, height, width).
        classes: Number of classes.
        mean: Mean of each channel over pixels in [0, 1], or one number for all.
        std: Standard deviation of each channel in the same unit, or one number for all; positive.
        softmax: Whether the network returns probabilities instead of logits.

    Raises:
        Refused: A shape, mean or std that makes no sense.
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
    ) -> None:
        super().__init__()
        self.network = network
        self.shape = shape
        self.classes = classes
        self.softmax = softmax
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, shape[0]):
                raise Refused(
                    f"--{name} has {len(values)} values, the images {shape[0]} channels: give 1 or {shape[0]}"
                )
        if min(std) <= 0:
            raise Refused(f"--std must be positive, not {min(std):g}")
        # Not persistent: a state dict holds the vendor's tensors and nothing of ours.
        for name, values in (("mean", mean), ("std", std)):
            column = torch.tensor(values, dtype=torch.float32).expand(shape[0]).reshape(1, -1, 1, 1).clone()
            self.register_buffer(name, column, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [n, classes] (float32) of pixels [n, c, h, w] in [0, 1]."""
        return self.logits(self.normalise(pixels))

    def logits(self, normalised: Tensor) -> Tensor:
        """Logits [n, classes] (float32) of images that are normalised already."""
        output = last(self.network(normalised)).float()
        return output.clamp_min(SMALLEST_PROBABILITY).log() if self.softmax else output

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] to what the network was trained on."""
        return (pixels - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return images * self.std + self.mean


def last(output: object) -> Tensor:
    """The logits inside whatever a network returns.

    Raises:
        Refused: No tensor [n, classes] is found there.
    """
    if isinstance(output, dict):
        output = output.get("logits")
    elif isinstance(output, tuple | list) and not hasattr(output, "logits"):
        output = output[-1] if output else None
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else "no tensor of logits"
        raise Refused(
            f"the network returns {found}; it must return logits [n, classes], alone, last in a tuple, or as .logits"
        )
    return output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is in the mode it was in (a defence may hold some of them apart)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
