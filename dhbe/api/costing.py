"""What a search will cost, told before the work: one small batch is timed, and the rest is counted."""

import copy
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from dhbe.api import machine
from dhbe.defenses import Defense, FastDHBE
from dhbe.search.families import FAMILIES
from dhbe.search.narrowed import SEARCHED
from dhbe.search.photographs import pieces
from dhbe.search.survey import Survey
from dhbe.search.verify import RESTARTS
from dhbe.steps import computing, on, secluded
from dhbe.suspects import Suspect

PIXELS = 2**16
"""Of each channel in the batch that is timed, in 2 to 32 images."""

BESIDE = 1.5
"""Times as long as its gradient steps does a search take, with all that is tried without gradients."""


@dataclass(frozen=True)
class Cost:
    """About what a run takes, at the most."""

    rounds: int
    seconds: float
    memory: int
    """Bytes."""

    def __str__(self) -> str:
        """In words.

        >>> str(Cost(80, 720.0, 1_100_000_000)), str(Cost(80, 40_000.0, 6_000_000_000))
        ('about 80 rounds, 12 min, 1.1 GB', 'about 80 rounds, 11 h, 6.0 GB')
        """
        hours, minutes = self.seconds / 3600, max(1, round(self.seconds / 60))
        took = f"{minutes} min" if minutes < 100 else f"{hours:.0f} h" if hours < 100 else f"{hours / 24:,.0f} days"
        return f"about {self.rounds} rounds, {took}, {self.memory / 1e9:.1f} GB"


def of(
    suspect: Suspect, what: Survey | Defense, device: str, precision: machine.Precision, *, twice: bool = False
) -> Cost | None:
    """What a search or a defence will cost on this machine; None for one whose passes are not counted here.

    Args:
        suspect: The model; it stays as it is.
        what: The survey, or the defence.
        device: As for the run.
        precision: As for the run.
        twice: Two states of the model are searched, as by `verify`.

    Raises:
        Refused: There is no such device.
    """
    survey = what if isinstance(what, Survey) else what.survey if isinstance(what, FastDHBE) else None
    if survey is None:
        return None
    classes = suspect.info.classes
    if isinstance(what, Survey) and not twice:
        classes = min(classes, SEARCHED + 1)  # a scan looks at no more
    count = max(survey.least_images, survey.images_per_class * classes)
    step = sum(kind.sought for kind in FAMILIES) * count
    images = survey.warm_up * (step + survey.generator_batch) + survey.second_rounds * survey.second_images * step
    images *= BESIDE
    if twice:
        images += 2 * RESTARTS * survey.warm_up * step * BESIDE
    rounds, batch = survey.rounds * (1 + 2 * RESTARTS * twice), max(survey.search_batch, survey.least_images)
    if isinstance(what, FastDHBE):
        images += (
            what.cycles * what.iterations * (what.student_steps * what.batch + what.families_at_once * what.seek_images)
        )
        rounds, batch = what.rounds, max(batch, what.batch)
    where = machine.device(device)
    seconds, held = _timed(suspect, where, machine.precision(precision, where, exact=False))
    weights = sum(each.numel() * each.element_size() for each in suspect.classifier.parameters())
    pool = min(survey.pool_bytes, 4 * survey.pool_size * math.prod(suspect.info.input))
    return Cost(rounds, images * seconds, 4 * weights + min(batch, count) * held + pool + 2**29)


def _timed(suspect: Suspect, where: torch.device, precision: machine.Precision) -> tuple[float, int]:
    """Seconds that one image takes forward and back, and bytes that are held for it meanwhile."""
    _, height, width = suspect.info.input
    count = min(max(PIXELS // (height * width), 2), 32)
    model = copy.deepcopy(suspect.classifier).to(where).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    held = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal held
        held += tensor.numel() * tensor.element_size()
        return tensor

    took = math.inf
    with secluded(), on(where), computing(where, "bf16" if precision == "bf16" else "fp32"):
        pixels = pieces(count, suspect.info.input).to(where)
        for _ in range(2):  # the first also warms up
            held, began = 0, time.monotonic()
            shown = pixels.clone().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                answer = model(shown).float().square().sum()
            answer.backward()
            answer.detach().item()  # waits for the device
            took = min(took, time.monotonic() - began)
    return took / count, held // count
