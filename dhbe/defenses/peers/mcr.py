"""MCR: trains a curve in weight space from the model to itself on clean images; its midpoint has lost the backdoor."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dhbe.classifier import Classifier, evaluating
from dhbe.data import Images
from dhbe.defenses.base import Known
from dhbe.defenses.peers.few_data import Tuner
from dhbe.run_state import RunState
from dhbe.search.batchnorm import tracked
from dhbe.settings import Setting
from dhbe.steps import Round, descend, set_lr


@dataclass(frozen=True)
class MCR(Tuner):
    """Mode connectivity repair (Zhao et al., ICLR 2020, arXiv:2005.00060): a quadratic Bezier curve with one bend.

    Both ends are the model itself, as in the DHBE paper (app. C b). That paper re-estimates the BatchNorm statistics on
    test images; here they come from the defender's clean images.
    """

    name: ClassVar[str] = "mcr"

    epochs: Annotated[int, Setting("epochs of training the curve", least=1)] = 200
    t: Annotated[float, Setting("position on the curve, from 0 to 1, of the resulting model")] = 0.5

    @property
    def rounds(self) -> int:
        return self.epochs

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        clean, curve, moving = self.lent(model, known), Curve(model), copy.deepcopy(model)
        learn = self.optimizer(curve.parameters())
        run_state.register(model=model, curve=curve, moving=moving, learn=learn)
        for epoch in range(run_state.restore(), self.epochs):
            set_lr([learn], self.decay(epoch))
            total, steps = torch.zeros(()), 0
            for pixels, labels in self.batches(clean):
                loss = F.cross_entropy(functional_call(moving, curve.weights(torch.rand(())), pixels), labels)
                descend(learn, loss)
                total, steps = total + loss.detach(), steps + 1
            place(model, curve.weights(torch.tensor(self.t)))
            if epoch + 1 == self.epochs and 0 < self.t < 1:  # the ends keep their own statistics
                estimate_statistics(model, clean)
            yield {"loss": total / steps}


class Curve(nn.Module):
    """Weights (1 - t)^2 w0 + 2 t (1 - t) w1 + t^2 w2 of convolutions, BatchNorm and linear layers; only w1 learns."""

    def __init__(self, end: Classifier) -> None:
        super().__init__()
        self._names = [name for name, _ in end.named_parameters()]
        self._ends = [parameter.detach().clone() for parameter in end.parameters()]
        self.bend = nn.ParameterList(parameter.detach().clone() for parameter in end.parameters())

    def weights(self, t: Tensor) -> dict[str, Tensor]:
        """The parameters by name at t, a scalar in [0, 1]."""
        own, other = (1 - t) ** 2 + t**2, 2 * t * (1 - t)  # w0 = w2
        return {name: own * w + other * b for name, w, b in zip(self._names, self._ends, self.bend, strict=True)}


@torch.no_grad()
def place(model: Classifier, weights: dict[str, Tensor]) -> None:
    """Copies parameters, given by name, into the model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


@torch.no_grad()
def estimate_statistics(model: Classifier, images: Images, batch: int = 256) -> None:
    """Re-estimates BatchNorm means and variances as averages over batches of images, with dropout off."""
    layers = tracked(model)
    momenta = [layer.momentum for layer in layers]
    with evaluating(model):
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
            layer.train()
        for pixels, _ in images.batches(batch):
            if len(pixels) > 1:
                model(pixels)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
