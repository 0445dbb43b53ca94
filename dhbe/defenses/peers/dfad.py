"""DFAD: adversarial distillation without triggers, to show what distillation alone does to a backdoor."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from dhbe.classifier import Classifier
from dhbe.defenses.base import Known
from dhbe.defenses.peers.distillation import Imitation
from dhbe.run_state import RunState
from dhbe.steps import Round


@dataclass(frozen=True)
class DFAD(Imitation):
    """Data-free adversarial distillation (Fang et al. 2019, arXiv:1912.11006): DHBE without its trigger generator."""

    name: ClassVar[str] = "dfad"

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        yield from self.imitate(model, run_state)
