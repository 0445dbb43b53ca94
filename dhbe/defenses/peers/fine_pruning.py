"""Fine-pruning: prunes channels that are inactive on clean images, then finetunes the rest."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier, evaluating
from dhbe.data import Images
from dhbe.defenses.base import Known
from dhbe.defenses.peers.few_data import Tuner, accuracy_on, hold_out
from dhbe.defenses.peers.layers import trace
from dhbe.errors import Refused
from dhbe.run_state import RunState
from dhbe.settings import Setting
from dhbe.steps import Round

GRID = 32
"""Maximum number of pruning levels at which accuracy is measured."""


@dataclass(frozen=True)
class FinePruning(Tuner):
    """Liu, Dolan-Gavitt and Garg, RAID 2018 (arXiv:1805.12185), sections 4.2 and 4.3.

    The channels are those of the last features, which a linear layer reads, flattened or averaged. Pruning a channel sets
    that layer's weights for it to 0 and keeps them there, so that the pruning is part of the saved weights.
    """

    name: ClassVar[str] = "fine-pruning"

    tolerance: Annotated[float, Setting("accuracy on the held-out images that pruning may cost")] = 0.04
    held: Annotated[float, Setting("share of the clean images held out to choose how many channels are pruned")] = 0.2

    @property
    def rounds(self) -> int:
        return 1 + self.epochs

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        clean, learn = self.lent(model, known), self.optimizer(model.parameters())
        graph = trace(model)
        if graph.reader is None or graph.reader.in_features % graph.channels:
            raise Refused(
                "fine-pruning finds no linear layer that reads the last convolution's channels: choose another defence"
            )
        reader = graph.reader
        run_state.register(model=model, learn=learn)
        done = run_state.restore()
        if done == 0:
            kept, judge = hold_out(clean, self.held)
            yield {"pruned": prune(model, reader, graph.channels, kept, judge, self.tolerance)}
        alive = (reader.weight != 0).any(0)  # what was pruned is 0 in the weights, also after an interruption
        hook = reader.weight.register_hook(lambda gradient: gradient * alive)
        try:
            for epoch in range(max(done, 1) - 1, self.epochs):
                yield {"loss": self.tune(model, learn, clean, epoch)}
        finally:
            hook.remove()


@torch.no_grad()
def prune(
    model: Classifier, reader: nn.Linear, channels: int, images: Images, judge: Images, tolerance: float
) -> Tensor:
    """Zeroes the reader's weights for the least active channels, as long as the accuracy on `judge` allows.

    Args:
        model: The model; `reader` is changed in place.
        reader: The linear layer that reads the last features.
        channels: Their channels.
        images: Images on which activity is measured.
        judge: Held-out images on which accuracy is measured.
        tolerance: Accuracy that may be lost, in [0, 1].

    Returns:
        The share of the channels that were pruned, a scalar.
    """
    each = reader.in_features // channels  # columns per channel: 1 if averaged, one per position if flattened
    order = activity(model, reader, channels, images).argsort()
    floor, accepted = accuracy_on(model, judge) - tolerance, reader.weight.clone()
    step, gone = -(-channels // GRID), 0
    for count in range(step, channels, step):
        columns = (order[:count, None] * each + torch.arange(each, device=order.device)).flatten()
        reader.weight[:, columns] = 0
        if accuracy_on(model, judge) < floor:
            break
        gone, accepted = count, reader.weight.clone()
    reader.weight.copy_(accepted)
    return torch.tensor(gone / channels)


@torch.no_grad()
def activity(model: Classifier, reader: nn.Linear, channels: int, images: Images, batch: int = 512) -> Tensor:
    """Mean absolute activation of each channel that `reader` reads, over images and positions [channels]."""
    total = torch.zeros(channels, device=reader.weight.device)

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total.add_(inputs[0].float().reshape(len(inputs[0]), channels, -1).abs().mean(2).sum(0))

    hook = reader.register_forward_pre_hook(add)
    with evaluating(model):
        for pixels, _ in images.batches(batch):
            model(pixels)
    hook.remove()
    return total / len(images)
