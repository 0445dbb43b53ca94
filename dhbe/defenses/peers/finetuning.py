"""Finetuning on clean images: the simplest defence."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from dhbe.classifier import Classifier
from dhbe.defenses.base import Known
from dhbe.defenses.peers.few_data import Tuner
from dhbe.run_state import RunState
from dhbe.steps import Round


@dataclass(frozen=True)
class Finetuning(Tuner):
    """Finetunes all layers with cross-entropy, by the protocol of the DHBE paper (Yan et al. 2023, app. C a)."""

    name: ClassVar[str] = "finetuning"

    @property
    def rounds(self) -> int:
        return self.epochs

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        clean, learn = self.lent(model, known), self.optimizer(model.parameters())
        run_state.register(model=model, learn=learn)
        for epoch in range(run_state.restore(), self.epochs):
            yield {"loss": self.tune(model, learn, clean, epoch)}
