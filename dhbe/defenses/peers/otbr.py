"""OTBR: prunes the filters that change most when the model unlearns noise, and fuses the result with the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from dhbe.classifier import Classifier, evaluating
from dhbe.defenses.base import Defense, Known
from dhbe.defenses.peers.inversion import invert, start
from dhbe.defenses.peers.layers import trace
from dhbe.errors import Refused
from dhbe.run_state import RunState
from dhbe.search.batchnorm import BatchStatistics
from dhbe.settings import Setting
from dhbe.steps import Round, descend, frozen_copy

GAMMAS = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Shares of the filters that may be pruned, as in the authors' script."""

BLUR = 0.01
"""Entropic regularisation of the transport, as a share of the mean cost."""


@dataclass(frozen=True)
class OTBR(Defense):
    """Optimal transport-based backdoor repairing (Lin et al., AAAI 2025, arXiv:2408.15861).

    The authors' script reports the share gamma that does best on test images. Here gamma is the largest share with which
    the fused model still agrees with the original on images inverted from it. The transport is entropic (Sinkhorn), not
    exact. 1 x 1 convolutions, mostly shortcuts, are left unchanged.
    """

    name: ClassVar[str] = "otbr"
    needs: ClassVar[frozenset] = frozenset()

    iterations: Annotated[int, Setting("steps of unlearning", least=1)] = 20
    batch: Annotated[
        int, Setting("noise images per step, and inverted images on which agreement is measured", least=4)
    ] = 256
    lr: Annotated[float, Setting("learning rate of the unlearning (SGD)")] = 0.01
    momentum: Annotated[float, Setting("momentum of SGD")] = 0.9
    fusion: Annotated[float, Setting("share of the pruned model in the fused one (lambda)")] = 0.5
    steps: Annotated[int, Setting("steps that make the inverted images", least=1)] = 300
    agreement: Annotated[float, Setting("share of the inverted images whose predicted class must not change")] = 0.95

    @property
    def rounds(self) -> int:
        return self.iterations + self.steps + 1

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        forgetful, teacher = frozen_copy(model).train().requires_grad_(True), frozen_copy(model)
        forget = SGD(forgetful.parameters(), self.lr, self.momentum, fused=True)
        inverted = nn.ParameterList([start(model, self.batch)])
        imagine = Adam(inverted.parameters(), 0.1)
        run_state.register(model=model, forgetful=forgetful, forget=forget, inverted=inverted, imagine=imagine)
        done = run_state.restore()
        for _ in range(done, self.iterations):
            labels = torch.randint(model.classes, (self.batch,))
            loss = F.cross_entropy(forgetful(torch.rand(self.batch, *model.shape)), labels)
            descend(forget, -loss)
            yield {"unlearning": loss}
        with BatchStatistics(teacher) as statistics:
            for _ in range(max(done, self.iterations), self.iterations + self.steps):
                yield invert(teacher, statistics, inverted[0], imagine)
        if done < self.rounds:
            yield {"pruned": self.repair(model, forgetful, teacher, inverted[0].detach())}

    @torch.no_grad()
    def repair(self, model: Classifier, forgetful: Classifier, teacher: Classifier, judge: Tensor) -> Tensor:
        """Prunes and fuses with growing gamma as long as enough images keep their class.

        Args:
            model: Changed in place.
            forgetful: The model after unlearning.
            teacher: The original model.
            judge: Images [n, c, h, w] in [0, 1] on which agreement is measured.

        Returns:
            The final gamma, a scalar.

        Raises:
            Refused: The network has no convolution larger than 1 x 1.
        """
        layers = [conv for conv in trace(model).convolutions if max(conv.kernel_size) > 1]
        if not layers:
            raise Refused("otbr finds no convolution larger than 1 x 1 in this network: choose another defence")
        names = {module: name for name, module in model.named_modules()}
        before = [conv.weight.clone() for conv in layers]
        after = [forgetful.get_parameter(f"{names[conv]}.weight") for conv in layers]
        changes = [(new - old).abs().flatten(1).sum(1) for new, old in zip(after, before, strict=True)]
        wanted, taken, accepted = teacher(judge).argmax(1), 0.0, before
        for gamma in GAMMAS:
            fused = fuse(before, changes, gamma, self.fusion)
            put(layers, fused)
            with evaluating(model):
                agreed = (model(judge).argmax(1) == wanted).float().mean()
            if agreed < self.agreement:
                break
            taken, accepted = gamma, fused
        put(layers, accepted)
        return torch.tensor(taken)


def put(layers: list[nn.Conv2d], weights: list[Tensor]) -> None:
    """Copies weights into layers."""
    for conv, weight in zip(layers, weights, strict=True):
        conv.weight.copy_(weight)


def fuse(weights: list[Tensor], changes: list[Tensor], gamma: float, share: float) -> list[Tensor]:
    """Fuses weights with a pruned copy in which the filters that changed most are 0.

    From the first pruned layer on, the pruned filters are transported onto the old ones, each weighted by how much it
    changed; the inputs are transported by the plan of the layer before (algorithm 1).

    Args:
        weights: Weights of the convolutions in network order, each [out, in, h, w].
        changes: Changes of their filters, each [out].
        gamma: Share of all filters that is pruned, in [0, 1].
        share: Share of the transported weights in the result, in [0, 1].
    """
    every = torch.cat(changes)
    least = every.topk(max(1, int(gamma * len(every)))).values[-1]
    fused, plan, begun = [], None, False
    for old, change in zip(weights, changes, strict=True):
        gone = change >= least
        begun = begun or bool(gone.any())
        if not begun:
            fused.append(old)
            continue
        pruned = old.masked_fill(gone.view(-1, 1, 1, 1), 0.0)
        carried = pruned
        if plan is not None and plan.shape[0] == old.shape[1]:  # else another layer lies between the two
            carried = torch.einsum("oihw,ij->ojhw", pruned, plan / plan.sum(0))
        plan = transport(torch.cdist(pruned.flatten(1), old.flatten(1)), change)
        fused.append(share * torch.einsum("kihw,kj->jihw", carried, plan / plan.sum(0)) + (1 - share) * old)
    return fused


def transport(cost: Tensor, weight: Tensor, steps: int = 300) -> Tensor:
    """Entropic optimal transport from uniform masses to masses proportional to `weight` (Cuturi 2013).

    Args:
        cost: [n, m], not negative.
        weight: [m], not negative.
        steps: Sinkhorn iterations, in the log domain.

    Returns:
        The plan [n, m]; its sum is 1.
    """
    count = torch.tensor(float(len(cost)))
    rows = -count.log().expand(len(cost))
    columns = (weight + 1e-6 * weight.max().clamp_min(1e-12)).log().log_softmax(0)
    kernel = -cost / (BLUR * cost.mean()).clamp_min(1e-12)
    down = torch.zeros_like(columns)
    for _ in range(steps):
        across = rows - (kernel + down).logsumexp(1)
        down = columns - (kernel + across[:, None]).logsumexp(0)
    return (kernel + across[:, None] + down).exp()
