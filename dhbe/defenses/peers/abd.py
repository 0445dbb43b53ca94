"""ABD: data-free distillation whose generator avoids images that a channel-shuffled teacher still classifies alike."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dhbe.classifier import Classifier
from dhbe.defenses.base import Known
from dhbe.defenses.peers.distillation import Imitation
from dhbe.defenses.peers.layers import trace
from dhbe.run_state import RunState
from dhbe.settings import Setting
from dhbe.steps import Round, frozen_copy


@dataclass(frozen=True)
class ABD(Imitation):
    """Anti-backdoor data-free distillation (Hong et al., ICML 2023, arXiv:2306.02368), its shuffling vaccine (sec. 4.2).

    A backdoor depends on few channels and survives shuffling the input channels of the last layers; benign features do
    not. Images to which the shuffled teacher assigns the teacher's class are therefore suspect, and the generator learns
    to make the two differ on them. The paper's second part, self-retrospection, is omitted; the student starts as a copy.
    """

    name: ClassVar[str] = "abd"

    vaccine: Annotated[float, Setting("weight of the shuffled teachers' term in the generator's loss")] = 0.1
    copies: Annotated[int, Setting("number of shuffled teachers, whose mean logits count")] = 3
    layers: Annotated[int, Setting("number of last convolutions whose input channels are shuffled")] = 5

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        teachers = [shuffled(model, self.layers) for _ in range(self.copies)]

        def dislike(x: Tensor, answer: Tensor) -> Tensor:
            return -self.vaccine * divergence(torch.stack([t.logits(x) for t in teachers]).mean(0), answer)

        yield from self.imitate(model, run_state, dislike)


@torch.no_grad()
def shuffled(model: Classifier, layers: int) -> Classifier:
    """A frozen copy whose last convolutions read their input channels in a random order."""
    teacher = frozen_copy(model)
    for conv in trace(teacher).convolutions[-layers:]:
        conv.weight.copy_(conv.weight[:, torch.randperm(conv.weight.shape[1])])
    return teacher


def divergence(other: Tensor, answer: Tensor) -> Tensor:
    """Mean of KL(answer || other) / classes over the images for which both logits [n, classes] predict the same class."""
    agree = (other.argmax(1) == answer.argmax(1)).float()
    each = F.kl_div(other.log_softmax(1), answer.softmax(1), reduction="none").mean(1)
    return (each * agree).sum() / agree.sum().clamp_min(1)
