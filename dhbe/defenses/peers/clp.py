"""CLP: prunes channels whose Lipschitz bound is an outlier in their layer; no data, no training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier
from dhbe.defenses.base import Defense, Known
from dhbe.defenses.peers.layers import trace
from dhbe.errors import Refused
from dhbe.run_state import RunState
from dhbe.settings import Setting
from dhbe.steps import Round


@dataclass(frozen=True)
class CLP(Defense):
    """Channel Lipschitzness based pruning (Zheng et al., ECCV 2022, arXiv:2208.03111), sections 4.2 and 4.3.

    A BatchNorm layer is paired with the convolution that feeds it in a forward pass, whatever order the two were
    registered in. A convolution without a BatchNorm behind it, such as the last one of a pre-activation block, is not
    pruned.
    """

    name: ClassVar[str] = "clp"
    needs: ClassVar[frozenset] = frozenset()

    u: Annotated[float, Setting("standard deviations above the layer's mean beyond which a channel is pruned")] = 3.0

    @property
    def rounds(self) -> int:
        return 1

    @torch.no_grad()
    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        run_state.register(model=model)
        if run_state.restore() == 0:
            pairs = [(conv, norm) for conv, norm in trace(model).normalised if norm.affine and norm.track_running_stats]
            if not pairs:
                raise Refused(
                    "clp finds no BatchNorm layer behind a convolution in this network: choose another defence"
                )
            gone = [prune(conv, norm, self.u) for conv, norm in pairs]
            yield {"pruned": torch.stack(gone).sum() / sum(norm.num_features for _, norm in pairs)}


def lipschitz(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Upper bound of each channel's Lipschitz constant (eq. 6): |gamma / sigma| times its filter's spectral norm.

    Returns:
        Bounds [channels]; each filter is reshaped to [inputs, height x width].
    """
    assert norm.running_var is not None
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs()
    return scale * torch.linalg.svdvals(conv.weight.float().flatten(2)).amax(1)


def prune(conv: nn.Conv2d, norm: nn.BatchNorm2d, u: float) -> Tensor:
    """Zeroes the channels whose bound exceeds mean + u x standard deviation of the layer; returns their number."""
    bounds = lipschitz(conv, norm)
    out = bounds > bounds.mean() + u * bounds.std(correction=min(1, len(bounds) - 1))
    norm.weight[out] = 0
    norm.bias[out] = 0
    return out.sum()
