"""Margins that images reach for each class (MM-BD, Wang et al., S&P 2024): far larger for a target class than for others.

Twenty Adam steps on eight images are as informative as hundreds, as later the other classes catch up. The mean over the
images is as informative as the largest margin, with less variance.
"""

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier
from dhbe.search.search import margin
from dhbe.steps import frozen_copy

AT_ONCE = 160
"""Images per forward pass."""

IMAGES, STEPS, LR = 8, 20, 0.05
"""Images and Adam steps for each class; the learning rate is for unbounded changes."""

FEW_IMAGES, FEW_STEPS = 2, 8
"""The same for the quick preselection of classes."""

FAINT = 16 / 255
"""Largest change of a pixel by a pattern that all images share."""


def from_noise(model: Classifier, labels: Tensor) -> Tensor:
    """The mean margin [k], in logits, that images optimised from uniform noise reach for classes `labels` [k]."""
    return raised(model, labels, torch.rand(IMAGES, *model.shape))


def from_images(model: Classifier, labels: Tensor, pixels: Tensor) -> Tensor:
    """The same from natural images [n, c, h, w] in [0, 1]: clean networks vary less there, and blends stand out."""
    return raised(model, labels, pixels)


def by_one_pattern(model: Classifier, labels: Tensor, pixels: Tensor, steps: int = STEPS) -> Tensor:
    """The mean margin [k] that natural images [n, c, h, w] in [0, 1] reach by a faint pattern added to all of them."""
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
    """Optimises images towards each of some classes, starting from the same images.

    Args:
        model: The suspect model. It is not changed.
        labels: The classes [k].
        start: Pixels [n, c, h, w] in [0, 1].
        bound: Largest change of a pixel; 1 is no bound.
        lr: Learning rate of Adam.
        shared: Whether all images of a class get the same change.
        steps: Adam steps.

    Returns:
        The mean margins reached, in logits [k].
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
                if not shared:  # pixels outside [0, 1] would have no gradient and never return
                    change.copy_((start + change).clamp(0, 1) - start)
        with torch.no_grad():
            final = margin(teacher((start + change).clamp(0, 1).flatten(0, 1)), wanted)
        reached.append(final.view(len(some), -1).mean(1))
    return torch.cat(reached)


class Unsaturated:
    """A classifier with the input of its final `nn.Softmax`, if any, as logits: probabilities saturate in float32."""

    def __init__(self, model: Classifier) -> None:
        self._model = model
        self._given: Tensor | None = None
        for layer in model.modules():
            if isinstance(layer, nn.Softmax):
                layer.register_forward_pre_hook(self._see)

    def _see(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._given = inputs[0]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits [n, classes]: the last softmax's input if it has this shape, else the classifier's output."""
        self._given = None
        output = self._model(pixels)
        return self._given if self._given is not None and self._given.shape == output.shape else output
