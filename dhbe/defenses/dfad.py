"""DFAD: adversarial distillation without triggers. It shows what distillation alone does to a backdoor."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from dhbe.classifier import Classifier
from dhbe.defenses.base import Known, Ledger, Round
from dhbe.defenses.imitation import Imitation


@dataclass(frozen=True)
class DFAD(Imitation):
    """Data-free adversarial distillation (Fang et al. 2019, arXiv:1912.11006): DHBE without its trigger generator."""

    name: ClassVar[str] = "dfad"

    def run(self, model: Classifier, known: Known, ledger: Ledger) -> Iterator[Round]:
        yield from self.imitate(model, ledger)
