"""Neural Cleanse: inverts the smallest trigger for each class, flags outliers, and unlearns their triggers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from dhbe.classifier import Classifier, evaluating
from dhbe.data import Images, Shape
from dhbe.defenses.base import Known
from dhbe.defenses.peers.few_data import Tuner
from dhbe.run_state import RunState
from dhbe.settings import Setting
from dhbe.steps import Round, descend, frozen

RAISE, LOWER = 2.0, 2.0**1.5
"""Factors by which the cost of a mask's size is raised and lowered."""

CONSISTENT = 1.4826
"""Scales the median absolute deviation to the standard deviation, for normal values."""


@dataclass(frozen=True)
class NeuralCleanse(Tuner):
    """Wang et al., S&P 2019: detection (sec. IV) and repair by unlearning (sec. VI); settings of their script.

    A trigger is a mask m and a pattern p, x' = (1 - m) x + m p in pixels. The search rotates through the classes, one
    pass over some images each. If no class is flagged, the model is left unchanged. The search finds the weakest trigger
    that works, which is often unlike the real one, and a model that unlearned it may still respond to the real one. So
    the search is restarted a few times for the flagged classes, and all triggers found are unlearned; their script does
    not do this.
    """

    name: ClassVar[str] = "neural-cleanse"

    search_epochs: Annotated[int, Setting("passes of the search for each class", least=1)] = 20
    search_size: Annotated[int, Setting("images per pass of the search, drawn anew for each", least=1)] = 160
    search_batch: Annotated[int, Setting("images per step of the search", least=1)] = 16
    lr_trigger: Annotated[float, Setting("learning rate of masks and patterns (Adam)")] = 0.1
    cost: Annotated[float, Setting("initial weight of a mask's L1 norm")] = 1e-3
    patience: Annotated[int, Setting("passes above or below the success rate after which the weight changes")] = 5
    success: Annotated[float, Setting("success rate that a trigger must reach")] = 0.99
    index: Annotated[float, Setting("anomaly index above which a class is flagged")] = 2.0
    restarts: Annotated[int, Setting("fresh searches before the repair, divided among the flagged classes")] = 8
    stamped: Annotated[float, Setting("share of the images that carry a found trigger during the repair")] = 0.2
    strength: Annotated[
        float, Setting("largest factor by which the found mask is strengthened, at random, during the repair")
    ] = 2.0

    @property
    def rounds(self) -> int:
        return self.search_epochs + self.restarts + self.epochs

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        clean, triggers = self.lent(model, known), Triggers(model.shape, model.classes, self.restarts, self.cost)
        seek = Adam(triggers.raw.parameters(), self.lr_trigger, betas=(0.5, 0.9))
        learn = self.optimizer(model.parameters())
        run_state.register(model=model, triggers=triggers, seek=seek, learn=learn)
        done = run_state.restore()

        for _ in range(done, self.search_epochs):
            for label in range(model.classes):
                self.search(model, triggers, seek, clean, label, place=label)
            norms = triggers.norms()
            yield {"mask": norms.min(), "success": triggers.rates.min(), "index": anomaly(norms).max()}

        flagged = torch.nonzero(anomaly(triggers.norms()) > self.index).flatten().tolist()
        if not flagged:
            return
        done = max(0, done - self.search_epochs)
        for again in range(done, self.restarts):
            label, place = flagged[again % len(flagged)], model.classes + again
            triggers.restart(label, seek)
            for _ in range(self.search_epochs):
                self.search(model, triggers, seek, clean, label, place)
            yield {"mask": triggers.masks[place].sum(), "success": triggers.rates[label]}

        worked = torch.nonzero(triggers.best[model.classes :].isfinite()).flatten() + model.classes
        places = [*flagged, *worked.tolist()]
        masks, patterns = triggers.masks[places], triggers.patterns[places]
        for epoch in range(max(0, done - self.restarts), self.epochs):
            yield {"loss": self.tune(model, learn, clean, epoch, stamp=lambda x: self.stamp(x, masks, patterns))}

    def stamp(self, pixels: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
        """Stamps `stamped` of the images with one trigger each, strengthened up to `strength` times.

        Args:
            pixels: Images [n, c, h, w] in [0, 1].
            masks: Masks [k, 1, h, w] in [0, 1].
            patterns: Patterns [k, c, h, w] in [0, 1].
        """
        which = torch.randint(len(masks), (len(pixels),))
        chosen = (torch.rand(len(pixels), 1, 1, 1) < self.stamped).float()
        factor = 1 + (self.strength - 1) * torch.rand(len(pixels), 1, 1, 1)
        return mix(pixels, chosen * (factor * masks[which]).clamp(max=1), patterns[which])

    def search(
        self, model: Classifier, triggers: "Triggers", seek: Adam, images: Images, label: int, place: int
    ) -> None:
        """Searches for one class in one pass, and keeps its trigger in slot `place` if it is the best there."""
        hits = torch.zeros(())
        order = torch.randperm(len(images))[: self.search_size]
        with evaluating(model), frozen(model):
            for index in order.split(self.search_batch):
                mask, pattern = triggers.trigger(label)
                logits = model(mix(images.float(index), mask, pattern))
                wanted = torch.full((len(index),), label)
                descend(seek, F.cross_entropy(logits, wanted) + triggers.costs[label] * mask.sum())
                hits = hits + (logits.argmax(1) == label).sum()
        triggers.rates[label] = hits / len(order)
        triggers.price(label, self)
        triggers.keep(label, place, triggers.rates[label] >= self.success)

    def found(self, run_state: RunState) -> dict[str, float]:
        indices = anomaly(run_state.part("triggers").norms())
        return {"anomaly_index": float(indices.max()), "suspected_class": int(indices.argmax())}


class Triggers(nn.Module):
    """A mask and a pattern for each class, the costs of the masks' sizes, and the best triggers.

    The first slots for triggers belong to the classes, the rest to the fresh searches.
    """

    costs: Tensor
    rates: Tensor
    above: Tensor
    below: Tensor
    best: Tensor
    masks: Tensor
    patterns: Tensor

    def __init__(self, shape: Shape, classes: int, restarts: int, cost: float) -> None:
        super().__init__()
        channels, height, width = shape
        self.cost, self.classes, places = cost, classes, classes + restarts
        # One parameter per class: Adam skips those without a gradient.
        self.raw = nn.ParameterList(start((channels + 1, height, width)) for _ in range(classes))
        self.register_buffer("costs", torch.full((classes,), cost))
        self.register_buffer("above", torch.zeros(classes))
        self.register_buffer("below", torch.zeros(classes))
        self.register_buffer("rates", torch.zeros(classes))
        self.register_buffer("best", torch.full((places,), torch.inf))
        self.register_buffer("masks", torch.zeros(places, 1, height, width))
        self.register_buffer("patterns", torch.zeros(places, *shape))

    def trigger(self, label: int) -> tuple[Tensor, Tensor]:
        """Mask [1, 1, h, w] and pattern [1, c, h, w] of a class, in (0, 1)."""
        raw = (self.raw[label].tanh() + 1) / 2
        return raw[None, :1], raw[None, 1:]

    @torch.no_grad()
    def keep(self, label: int, place: int, passed: Tensor) -> None:
        """Keeps the trigger of a class in a slot if it is the smallest successful one there, or if none has succeeded yet."""
        mask, pattern = self.trigger(label)
        if (passed and mask.sum() < self.best[place]) or self.best[place].isinf():
            self.masks[place], self.patterns[place] = mask[0], pattern[0]
            self.best[place] = mask.sum() if passed else torch.inf

    @torch.no_grad()
    def restart(self, label: int, seek: Adam) -> None:
        """Restarts the search for a class from a random trigger."""
        self.raw[label].copy_(start(self.raw[label].shape))
        seek.state.pop(self.raw[label], None)
        self.costs[label], self.above[label], self.below[label] = self.cost, 0, 0

    def price(self, label: int, settings: NeuralCleanse) -> None:
        """Raises or lowers the cost of the mask's size once its trigger has succeeded or failed `patience` times in a row."""
        passed = self.rates[label] >= settings.success
        self.above[label] = self.above[label] + 1 if passed else 0
        self.below[label] = 0 if passed else self.below[label] + 1
        if self.above[label] >= settings.patience:
            self.costs[label] *= RAISE
            self.above[label] = 0
        elif self.below[label] >= settings.patience:
            self.costs[label] /= LOWER
            self.below[label] = 0

    def norms(self) -> Tensor:
        """L1 norm of each class's mask [classes], in pixels."""
        return self.masks[: self.classes].flatten(1).sum(1)


def start(shape: Sequence[int]) -> Tensor:
    """Initial masks and patterns: uniform in (0, 1) after the tanh of `Triggers.trigger`."""
    return torch.rand(*shape).mul(2).sub(1).mul(0.999).atanh()


def mix(pixels: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Images [n, c, h, w] with a trigger: (1 - m) x + m p (eq. 2)."""
    return (1 - mask) * pixels + mask * pattern


def anomaly(norms: Tensor) -> Tensor:
    """Anomaly index of each class [classes]: how far its mask is below the median, in robust deviations; 0 if above.

    The median of an even number of classes is the mean of the middle two, unlike `torch.median`.

    >>> [round(float(x), 2) for x in anomaly(torch.tensor([4.0, 30.0, 32.0, 34.0]))]
    [9.11, 0.34, 0.0, 0.0]
    """
    median = norms.quantile(0.5)
    deviation = CONSISTENT * (norms - median).abs().quantile(0.5)
    return ((median - norms) / deviation.clamp_min(1e-6)).clamp_min(0)
