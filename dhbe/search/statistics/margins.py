"""How far images can be led to each class (MM-BD, Wang et al., S&P 2024): a backdoored class reaches far more than others.

Twenty steps of Adam on eight images tell as much as hundreds, for later the other classes catch up; the mean over the
images varies less by chance than the largest margin and tells as much.
"""

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier
from dhbe.search.search import margin
from dhbe.steps import frozen_copy

AT_ONCE = 160
"""Images in one pass."""

IMAGES, STEPS, LR = 8, 20, 0.05
"""For each class; the learning rate is for changes without a bound."""

FEW_IMAGES, FEW_STEPS = 2, 8
"""For each class, where the question is only which classes of many to look at."""

FAINT = 16 / 255
"""Largest change of a pixel by a pattern that all images share."""


def from_noise(model: Classifier, labels: Tensor) -> Tensor:
    """The mean margin of classes [k] that whole images reach from uniform noise [k]."""
    return raised(model, labels, torch.rand(IMAGES, *model.shape))


def from_images(model: Classifier, labels: Tensor, pixels: Tensor) -> Tensor:
    """The same from natural images [n, c, h, w], eight or more: clean networks are quieter there, and blends stand out."""
    return raised(model, labels, pixels)


def by_one_pattern(model: Classifier, labels: Tensor, pixels: Tensor, steps: int = STEPS) -> Tensor:
    """The mean margin that natural images [n, c, h, w] reach by one faint pattern added to them all [k]."""
    return raised(model, labels, pixels, bound=FAINT, lr=FAINT / 4, shared=True, steps=steps)


@torch.enable_grad()
def raised(
    model: Classifier,
    labels: Tensor,
    start: Tensor,
    *,
    bound: float = 1.0,
    lr: float = LR,
    shared: bool = False,
    steps: int = STEPS,
) -> Tensor:
    """Leads images to classes; each class starts from the same ones.

    Args:
        model: The suspect. It is not changed.
        labels: The classes [k].
        start: Pixels [n, c, h, w] in [0, 1].
        bound: Largest change of a pixel; 1 is free.
        lr: Learning rate of Adam.
        shared: Whether all images of a class get the same change.
        steps: Of Adam.

    Returns:
        The mean margin that is reached [k].
    """
    teacher, reached = Unsaturated(frozen_copy(model)), []
    for some in labels.split(max(1, AT_ONCE // len(start))):
        change = nn.Parameter(torch.zeros(len(some), 1 if shared else len(start), *model.shape))
        ascend, wanted = torch.optim.Adam([change], lr), some.repeat_interleave(len(start))
        for _ in range(steps):
            ascend.zero_grad()
            (-margin(teacher((start + change).clamp(0, 1).flatten(0, 1)), wanted).sum()).backward()
            ascend.step()
            with torch.no_grad():
                change.clamp_(-bound, bound)
                if not shared:  # what leaves [0, 1] would have no gradient and never come back
                    change.copy_((start + change).clamp(0, 1) - start)
        with torch.no_grad():
            final = margin(teacher((start + change).clamp(0, 1).flatten(0, 1)), wanted)
        reached.append(final.view(len(some), -1).mean(1))
    return torch.cat(reached)


class Unsaturated:
    """A network that ends in `nn.Softmax`, giving what goes into it: margins of probabilities end where float32 does."""

    def __init__(self, model: Classifier) -> None:
        self._model = model
        self._given: Tensor | None = None
        for layer in model.modules():
            if isinstance(layer, nn.Softmax):
                layer.register_forward_pre_hook(self._see)

    def _see(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._given = inputs[0]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits [n, classes]: the last softmax's input where it has their shape, or what the network returns."""
        self._given = None
        output = self._model(pixels)
        return self._given if self._given is not None and self._given.shape == output.shape else output
