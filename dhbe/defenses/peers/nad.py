"""NAD: distils the attention maps of a finetuned copy into the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.defenses.base import Known
from dhbe.defenses.peers.few_data import Tuner
from dhbe.defenses.peers.layers import Features, Tap, trace
from dhbe.run_state import RunState
from dhbe.settings import Setting
from dhbe.steps import Round, descend, frozen_copy, set_lr


@dataclass(frozen=True)
class NAD(Tuner):
    """Neural attention distillation (Li et al., ICLR 2021, arXiv:2101.05930), eq. 2 to 5.

    The teacher is a finetuned copy. Attention maps are compared after each stage of the network, that is at the last
    features of each resolution; in a residual network these are its residual stages.
    """

    name: ClassVar[str] = "nad"

    teacher_epochs: Annotated[int, Setting("epochs of finetuning the teacher beforehand", least=1)] = 10
    beta_first: Annotated[float, Setting("weight of the first stage's attention")] = 500.0
    beta: Annotated[float, Setting("weight of the attention of each other stage")] = 1000.0

    @property
    def rounds(self) -> int:
        return self.teacher_epochs + self.epochs

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        clean, taps = self.lent(model, known), trace(model).stages
        teacher = frozen_copy(model)
        teach, learn = self.optimizer(teacher.parameters()), self.optimizer(model.parameters())
        run_state.register(model=model, teacher=teacher, teach=teach, learn=learn)
        done = run_state.restore()
        teacher.train().requires_grad_(True)
        for epoch in range(done, self.teacher_epochs):
            yield {"teacher_loss": self.tune(teacher, teach, clean, epoch, self.teacher_epochs)}
        teacher.eval().requires_grad_(False)
        for epoch in range(max(0, done - self.teacher_epochs), self.epochs):
            set_lr([learn], self.decay(epoch))
            yield self.distil(model, teacher, taps, learn, clean)

    def distil(
        self, model: Classifier, teacher: Classifier, taps: list[Tap], learn: torch.optim.Optimizer, clean: Images
    ) -> Round:
        """Trains for one epoch with cross-entropy and attention losses; returns the last step's losses."""
        losses: Round = {}
        with Features(model.network, taps) as seen, Features(teacher.network, taps) as wanted:
            for pixels, labels in self.batches(clean):
                with torch.no_grad():
                    teacher(pixels)
                losses["loss"] = F.cross_entropy(model(pixels), labels)
                gaps = [F.mse_loss(attention(a), attention(b)) for a, b in zip(seen.take(), wanted.take(), strict=True)]
                losses["attention"] = torch.stack(gaps).sum()
                weighted = self.beta_first * gaps[0] + self.beta * (losses["attention"] - gaps[0])
                descend(learn, losses["loss"] + weighted)
        return losses


def attention(features: Tensor) -> Tensor:
    """Attention map [n, h, w] of features [n, c, h, w]: squares summed over channels, each map of L2 norm 1 (eq. 2)."""
    return F.normalize(features.float().square().sum(1).flatten(1), dim=1).view(-1, *features.shape[2:])
