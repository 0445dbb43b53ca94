"""The triggers that a run has found."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.search.families import Overlay
from dhbe.search.search import margin
from dhbe.settings import Setting

NEVER_ZERO = 1e-6
"""Keeps a draw possible where no trigger was found at all."""

AT_ONCE = 128
"""Images in one pass when triggers are tried."""


@dataclass(frozen=True)
class BankSettings:
    """How many triggers are kept, and how they are shown."""

    bank_size: Annotated[int, Setting("triggers that are kept at the most, or 4 a class if that is more", least=1)] = (
        128
    )
    copies: Annotated[int, Setting("copies that a small trigger may have beside it, as ASR x9 has", least=1)] = 8
    room: Annotated[float, Setting("share of an image that a trigger and its copies may cover", most=1)] = 0.45
    rehearsal: Annotated[float, Setting("share of the triggers shown that is drawn from all alike", most=1)] = 0.3
    least_gain: Annotated[float, Setting("gain from which a trigger is said to act", most=1)] = 0.01
    moved_triggers: Annotated[
        int, Setting("strongest triggers that are moved, to see whether they act at other places too", least=1)
    ] = 16


class TriggerBank(nn.Module):
    """Triggers, of which none is forgotten until the bank is full; then the weakest goes first."""

    keep: Tensor
    add: Tensor
    wanted: Tensor
    """The class that each leads to [size]."""
    strength: Tensor
    """Its mean margin when it was found [size]; minus infinity where there is none."""
    gain: Tensor
    """What it added to the chance of its class when it was tried last [size]: see `gains`."""
    place_invariant: Tensor
    """Whether the teacher answers its triggers at other places too; one that flattens its features does not."""

    def __init__(self, settings: BankSettings, shape: Shape, classes: int) -> None:
        super().__init__()
        self.settings = settings
        channels, height, width = shape
        size = max(settings.bank_size, 4 * classes)
        self.register_buffer("keep", torch.ones(size, 1, height, width))
        self.register_buffer("add", torch.zeros(size, channels, height, width))
        self.register_buffer("wanted", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("strength", torch.full((size,), -torch.inf))
        self.register_buffer("gain", torch.zeros(size))
        self.register_buffer("place_invariant", torch.ones((), dtype=torch.bool))

    def __len__(self) -> int:
        return int((self.strength > -torch.inf).sum())

    def take(self, triggers: Overlay, wanted: Tensor, strength: Tensor) -> None:
        """Takes triggers in, in place of empty ones, then of those that act no longer, and then of weaker ones."""
        for keep, add, label, value in zip(triggers.keep, triggers.add, wanted, strength, strict=True):
            acts = self.gain > self.settings.least_gain
            weakest = torch.where(acts & ~acts.all(), torch.inf, self.strength).argmin()
            if value > self.strength[weakest] or not acts[weakest]:
                self.keep[weakest], self.add[weakest] = keep, add
                self.wanted[weakest], self.strength[weakest], self.gain[weakest] = label, value, 1.0

    def triggers(self, index: Tensor) -> Overlay:
        """The triggers at places [n]."""
        return Overlay(self.keep[index], self.add[index])

    def draw(self, count: int) -> tuple[Overlay, Tensor]:
        """Triggers by chance, more often those that still act, half of them weaker; and their classes [count].

        Where triggers act at any place, the weaker ones are at other places, and small ones come alone half of the time, else
        with as many copies as there is room for: what one patch no longer does, several may (section 5.3 of the paper,
        amplified triggers). What hides the image itself teaches nothing. A share of the draws goes to all alike: what acts no
        longer is learned again where it is never rehearsed. Nothing here waits for the device.
        """
        acting, known = self.gain + NEVER_ZERO, (self.strength > -torch.inf) + NEVER_ZERO
        share = self.settings.rehearsal
        chance = (1 - share) * acting / acting.sum() + share * known / known.sum()
        index = torch.multinomial(chance, count, replacement=True)
        drawn = self.triggers(index)
        weaker, several, many = torch.rand(3, count) < 0.5
        opacity = torch.where(weaker, 0.5 + 0.5 * torch.rand(count), 1.0).view(-1, 1, 1, 1)
        laid = drawn.weaker(opacity).moved(self._shifts(count) * (weaker & self.place_invariant)[:, None])
        copies = torch.where(many, self.settings.copies, torch.randint(1, self.settings.copies + 1, (count,)))
        return self._among_copies(laid, drawn, several * copies), self.wanted[index]

    def _among_copies(self, laid: Overlay, drawn: Overlay, copies: Tensor) -> Overlay:
        """Triggers under so many copies [n] at places by chance, or as many as there is room for.

        There are none of what acts at its own place alone, or covers nothing.
        """
        area = drawn.area
        room = (self.settings.room / area).floor() - 1  # endless for what covers nothing
        copies = copies.minimum(room.clamp_min(0)) * self.place_invariant * (area > 0)
        for number in range(self.settings.copies):
            shown = (copies > number).float().view(-1, 1, 1, 1)
            laid = laid.under(drawn.moved(self._shifts(len(copies))).weaker(shown))
        return laid

    def amplified(self, triggers: Overlay) -> Overlay:
        """Triggers [n], each among as many copies as there is room for, as ASR x9 has."""
        return self._among_copies(triggers, triggers, torch.full((len(triggers.keep),), self.settings.copies))

    def _shifts(self, count: int) -> Tensor:
        """Rows and columns by chance [count, 2]."""
        return torch.randint(self.keep.shape[-1], (count, 2))

    @torch.no_grad()
    def tried(self, model: Classifier, pixels: Tensor) -> Tensor:
        """The gain of each trigger [size] in a model, on images [n, c, h, w]; 0 where there is none.

        Where triggers act at any place, one counts as much as it does alone or among copies, each on half of the images.
        """
        known = (self.strength > -torch.inf).nonzero().flatten()
        gain, triggers, wanted = torch.zeros_like(self.gain), self.triggers(known), self.wanted[known]
        if not self.place_invariant:
            gain[known] = gains(model, triggers, wanted, pixels)
            return gain
        alone, among = pixels.chunk(2)
        gain[known] = torch.maximum(
            gains(model, triggers, wanted, alone), gains(model, self.amplified(triggers), wanted, among)
        )
        return gain

    def retry(self, model: Classifier, pixels: Tensor) -> None:
        """Notes `tried`."""
        self.gain = self.tried(model, pixels)

    @torch.no_grad()
    def settle(self, teacher: Classifier, pixels: Tensor) -> None:
        """Notes what the teacher answers: each trigger where it was found, and whether elsewhere too."""
        self.place_invariant.fill_(False)
        self.retry(teacher, pixels)
        strongest = self.gain.argsort(descending=True)[: self.settings.moved_triggers]
        elsewhere = self.triggers(strongest).moved(self._shifts(len(strongest)))
        moved = gains(teacher, elsewhere, self.wanted[strongest], pixels)
        self.place_invariant = moved.sum() > self.gain[strongest].sum() / 2


def gains(model: Classifier, triggers: Overlay, wanted: Tensor, pixels: Tensor) -> Tensor:
    """How much more of the images each trigger brings to its class [k]; those that almost go there count too.

    It is the mean gain of the logistic function of the margin, a soft share.

    Args:
        model: What is triggered.
        triggers: The triggers.
        wanted: Their classes [k].
        pixels: The images [n, c, h, w].
    """
    if not len(wanted):
        return torch.zeros(0)
    clean, found = model(pixels), []
    for some in torch.arange(len(wanted)).split(max(1, AT_ONCE // len(pixels))):
        each = some.repeat_interleave(len(pixels))
        triggered = model(triggers[each](pixels.repeat(len(some), 1, 1, 1)))
        before = margin(clean.repeat(len(some), 1), wanted[each]).sigmoid()
        gained = margin(triggered, wanted[each]).sigmoid() - before
        found.append(gained.clamp_min(0).view(len(some), -1).mean(1))
    return torch.cat(found)
