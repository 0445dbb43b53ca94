"""Estimates the cost of a search beforehand, by timing one small batch and counting passes."""

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
from dhbe.search.statistics import STATISTICS, margins
from dhbe.search.survey import Survey
from dhbe.search.verify import RESTARTS
from dhbe.steps import computing, on, secluded
from dhbe.suspects import Suspect

PIXELS = 2**16
"""Pixels per channel in the timed batch, in 2 to 32 images."""

FORWARD, TRAINING = 0.5, 1.5
"""Cost of a pass without gradients, and of one with gradients of the weights too, relative to that of a search step."""

PLACES = 225
"""Squares that are cut from one deep image: at every other row and column."""


@dataclass(frozen=True)
class Cost:
    """Approximate upper bounds of a run's cost."""

    rounds: int
    seconds: float
    memory: int
    """Bytes."""

    def __str__(self) -> str:
        """The cost in words.

        >>> str(Cost(80, 720.0, 1_100_000_000)), str(Cost(80, 40_000.0, 6_000_000_000))
        ('about 80 rounds, 12 min, 1.1 GB', 'about 80 rounds, 11 h, 6.0 GB')
        """
        hours, minutes = self.seconds / 3600, max(1, round(self.seconds / 60))
        took = f"{minutes} min" if minutes < 100 else f"{hours:.0f} h" if hours < 100 else f"{hours / 24:,.0f} days"
        return f"about {self.rounds} rounds, {took}, {self.memory / 1e9:.1f} GB"


def of(
    suspect: Suspect, what: Survey | Defense, device: str, precision: machine.Precision, *, twice: bool = False
) -> Cost | None:
    """The estimated cost of a search or a defence on this machine; None for defences without an estimate.

    Args:
        suspect: The model; it is not changed.
        what: The survey, or the defence.
        device: As for the run.
        precision: As for the run.
        twice: Whether two states of the model are searched, as by `verify`.

    Raises:
        Refused: There is no such device.
    """
    survey = what if isinstance(what, Survey) else what.survey if isinstance(what, FastDHBE) else None
    if survey is None:
        return None
    classes = suspect.info.classes
    if isinstance(what, Survey) and not twice:
        classes = min(classes, SEARCHED + 1)  # a scan searches no more
    images = _survey(survey, classes)
    rounds, batch = survey.rounds * (1 + 2 * RESTARTS * twice), max(survey.search_batch, survey.least_images)
    if twice:
        images += 2 * RESTARTS * (survey.warm_up * _step(survey, classes) + _cuts(survey, classes))
    if isinstance(what, FastDHBE):
        images += _cycles(what)
        rounds, batch = what.rounds, max(batch, what.batch)
    where = machine.device(device)
    seconds, held = _timed(suspect, where, machine.precision(precision, where, exact=False))
    weights = sum(each.numel() * each.element_size() for each in suspect.classifier.parameters())
    pool = min(survey.pool_bytes, 4 * survey.pool_size * math.prod(suspect.info.input))
    return Cost(rounds, images * seconds, 4 * weights + min(batch, _count(survey, classes)) * held + pool + 2**29)


def _count(survey: Survey, classes: int) -> int:
    """Images in one step of a family."""
    return max(survey.least_images, survey.images_per_class * classes)


def _step(survey: Survey, classes: int) -> float:
    """Images in one step of all families."""
    return sum(kind.sought for kind in FAMILIES) * _count(survey, classes)


def _cuts(survey: Survey, classes: int) -> float:
    """Images for the excerpts of all classes."""
    cut = survey.excerpting
    return classes * (cut.deep_images * cut.deep_steps + FORWARD * cut.deep_cut * PLACES * cut.swept_images)


def _survey(survey: Survey, classes: int) -> float:
    """Images of a survey: the rounds, the statistics and the excerpts."""
    rounds = survey.warm_up * (_step(survey, classes) + survey.generator_batch)
    second = survey.second_rounds * survey.second_images * _step(survey, classes)
    return rounds + second + len(STATISTICS) * classes * margins.IMAGES * margins.STEPS + _cuts(survey, classes)


def _cycles(fast: FastDHBE) -> float:
    """Images of the cycles after a survey that found something, with their looks and hunts."""
    cut, bank = fast.survey.excerpting, fast.survey.bank
    rounds = TRAINING * fast.student_steps * fast.batch + fast.families_at_once * fast.seek_images
    look = 2 * FORWARD * bank.bank_size * fast.gain_images  # of this state and of the best one
    swept = FORWARD * (len(cut.hunt_sides) + 2) * cut.deep_images * PLACES * cut.swept_images
    hunt = cut.deep_images * cut.deep_steps + swept + cut.scattered_steps * cut.scattered_images
    refined = fast.survey.second_rounds * fast.survey.least_images * len(FAMILIES)
    cycle = fast.iterations * (rounds + look / fast.look_every) + hunt
    return fast.cycles * cycle + hunt + refined


def _timed(suspect: Suspect, where: torch.device, precision: machine.Precision) -> tuple[float, int]:
    """Seconds per image for a forward and backward pass, and bytes per image saved for backward."""
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
            answer.detach().item()  # synchronises with the device
            took = min(took, time.monotonic() - began)
    return took / count, held // count
