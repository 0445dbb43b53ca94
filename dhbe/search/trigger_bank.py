"""The bank of triggers that a run has found."""

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
"""Makes a draw possible even if no trigger was found."""

AT_ONCE = 128
"""Images per forward pass when triggers are tested."""


@dataclass(frozen=True)
class BankSettings:
    """How many triggers are kept, and how they are drawn."""

    bank_size: Annotated[int, Setting("maximum number of triggers kept, or 4 per class if that is more", least=1)] = 128
    copies: Annotated[
        int, Setting("maximum number of copies stamped beside a small trigger, as in ASR x9", least=1)
    ] = 8
    among_copies: Annotated[float, Setting("share of the triggers drawn that are stamped among copies", most=1)] = 0.75
    room: Annotated[float, Setting("share of an image that a trigger and its copies may cover", most=1)] = 0.45
    rehearsal: Annotated[
        float, Setting("share of the triggers drawn uniformly, whether they still act or not", most=1)
    ] = 0.3
    least_gain: Annotated[float, Setting("gain above which a trigger counts as acting", most=1)] = 0.01
    moved_triggers: Annotated[
        int, Setting("strongest triggers that are moved to test whether they act at other positions too", least=1)
    ] = 16


class TriggerBank(nn.Module):
    """A fixed number of slots for triggers; once all are taken, the weakest trigger is replaced first."""

    keep: Tensor
    add: Tensor
    wanted: Tensor
    """The class that each trigger leads to, int64 [size]."""
    strength: Tensor
    """Its mean margin in logits when it was found [size]; minus infinity in empty slots."""
    gain: Tensor
    """Its gain when it was last tested [size], in [0, 1]: see `gains`."""
    place_invariant: Tensor
    """Whether the teacher responds to triggers at other positions too, bool; one that flattens its features does not."""

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
        """Adds triggers; they replace empty slots first, then triggers that no longer act, then weaker ones.

        Args:
            triggers: The triggers, k of them.
            wanted: Their classes [k].
            strength: Their mean margins in logits [k].
        """
        for keep, add, label, value in zip(triggers.keep, triggers.add, wanted, strength, strict=True):
            acts = self.gain > self.settings.least_gain
            weakest = torch.where(acts & ~acts.all(), torch.inf, self.strength).argmin()
            if value > self.strength[weakest] or not acts[weakest]:
                self.keep[weakest], self.add[weakest] = keep, add
                self.wanted[weakest], self.strength[weakest], self.gain[weakest] = label, value, 1.0

    def triggers(self, index: Tensor) -> Overlay:
        """The triggers in slots `index` [n]."""
        return Overlay(self.keep[index], self.add[index])

    def draw(self, count: int) -> tuple[Overlay, Tensor]:
        """Draws random triggers, preferring those that still act, and weakens half of them.

        If triggers act at any position, the weakened ones are moved as well. Most triggers get copies, their number limited by
        `room`: several patches may still do what one no longer does (section 5.3 of the paper, amplified triggers), but
        covering the whole image would teach nothing. A share of the draws is uniform, as triggers that are never rehearsed
        are learned again. Nothing here synchronises with the device.

        Returns:
            The triggers, and their classes [count].
        """
        acting, known = self.gain + NEVER_ZERO, (self.strength > -torch.inf) + NEVER_ZERO
        share = self.settings.rehearsal
        chance = (1 - share) * acting / acting.sum() + share * known / known.sum()
        index = torch.multinomial(chance, count, replacement=True)
        drawn = self.triggers(index)
        weaker, many = torch.rand(2, count) < 0.5
        several = torch.rand(count) < self.settings.among_copies
        opacity = torch.where(weaker, 0.5 + 0.5 * torch.rand(count), 1.0).view(-1, 1, 1, 1)
        laid = drawn.weaker(opacity).moved(self._shifts(count) * (weaker & self.place_invariant)[:, None])
        copies = torch.where(many, self.settings.copies, torch.randint(1, self.settings.copies + 1, (count,)))
        return self._among_copies(laid, drawn, several * copies), self.wanted[index]

    def _among_copies(self, laid: Overlay, drawn: Overlay, copies: Tensor) -> Overlay:
        """`laid` under `copies` [n] copies of `drawn` at random positions, limited by `room`; none if they cover nothing."""
        area = drawn.area
        room = (self.settings.room / area).floor() - 1  # infinite for triggers that cover nothing
        copies = copies.minimum(room.clamp_min(0)) * (area > 0)
        for number in range(self.settings.copies):
            shown = (copies > number).float().view(-1, 1, 1, 1)
            laid = laid.under(drawn.moved(self._shifts(len(copies))).weaker(shown))
        return laid

    def amplified(self, triggers: Overlay) -> Overlay:
        """The triggers with the maximum number of copies that `room` allows, as in ASR x9."""
        return self._among_copies(triggers, triggers, torch.full((len(triggers.keep),), self.settings.copies))

    def _shifts(self, count: int) -> Tensor:
        """Random rows and columns [count, 2]."""
        return torch.randint(self.keep.shape[-1], (count, 2))

    @torch.no_grad()
    def tried(self, model: Classifier, pixels: Tensor) -> Tensor:
        """The gain of each trigger [size] in a model, on images [n, c, h, w] in [0, 1]; 0 in empty slots.

        It is the larger of the gains alone and with copies, each on half of the images.
        """
        known = (self.strength > -torch.inf).nonzero().flatten()
        gain, triggers, wanted = torch.zeros_like(self.gain), self.triggers(known), self.wanted[known]
        alone, among = pixels.chunk(2)
        gain[known] = torch.maximum(
            gains(model, triggers, wanted, alone), gains(model, self.amplified(triggers), wanted, among)
        )
        return gain

    def retry(self, model: Classifier, pixels: Tensor) -> None:
        """Updates `gain` with the result of `tried`."""
        self.gain = self.tried(model, pixels)

    @torch.no_grad()
    def settle(self, teacher: Classifier, pixels: Tensor) -> None:
        """Records the gain of each trigger in the teacher, and whether triggers act at other positions too."""
        self.retry(teacher, pixels)
        strongest = self.gain.argsort(descending=True)[: self.settings.moved_triggers]
        elsewhere = self.triggers(strongest).moved(self._shifts(len(strongest)))
        moved = gains(teacher, elsewhere, self.wanted[strongest], pixels)
        self.place_invariant = moved.sum() > self.gain[strongest].sum() / 2


def gains(model: Classifier, triggers: Overlay, wanted: Tensor, pixels: Tensor) -> Tensor:
    """The gain of each trigger [k], in [0, 1]: a soft version of the share of images that it newly leads to its class.

    It is the mean increase of the logistic function of the margin, decreases counting as 0.

    Args:
        model: The model.
        triggers: The triggers, k of them.
        wanted: Their classes [k].
        pixels: The images [n, c, h, w] in [0, 1].
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
