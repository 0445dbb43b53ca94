"""Variants of a trigger that an attacker could use without changing the model."""

from collections.abc import Callable, Iterator

import torch

from dhbe.attacks.triggers import Patch, Trigger
from dhbe.attacks.triggers.patch import CORNERS
from dhbe.errors import Refused

OPACITIES = (0.25, 0.5, 0.75, 1.5)
SIZES = (0.75, 1.5, 2.0)
ANYWHERE = 3
"""Number of random positions in addition to the centre and the corners."""


def forms(trigger: Trigger, generator: torch.Generator) -> dict[str, Trigger]:
    """The trigger as it is, amplified, weaker and stronger, smaller and larger, and at other positions.

    Args:
        trigger: The true trigger.
        generator: Draws the random positions.

    Returns:
        The forms by the suffix that selects them on the command line ("" for the trigger as it is). Forms that the trigger
        does not support, or that look the same, are left out.
    """
    grey = torch.full((1, *trigger.shape), 0.5)
    found = {"": trigger}
    for make in _makers(trigger, generator):
        try:
            form = make()
        except Refused:  # too large for the image, or too strong for the range of pixels
            continue
        if form is not None and not torch.equal(form(grey), trigger(grey)):
            found[form.name.removeprefix(f"{trigger.name}:")] = form
    return found


def _makers(trigger: Trigger, generator: torch.Generator) -> Iterator[Callable[[], Trigger | None]]:
    yield lambda: trigger.amplified(4)
    yield lambda: trigger.amplified(9)
    for opacity in OPACITIES:
        yield lambda opacity=opacity: trigger.faded(opacity)
    for size in SIZES:
        yield lambda size=size: trigger.resized(size)
    for place in (*CORNERS, "center", *_anywhere(trigger, generator)):
        yield lambda place=place: trigger.moved(place)


def _anywhere(trigger: Trigger, generator: torch.Generator) -> Iterator[tuple[int, int]]:
    """Random positions at which the patch lies inside the image."""
    if not isinstance(trigger, Patch):
        return
    room = [side - (part.stop - part.start) for side, part in zip(trigger.shape[1:], trigger.box, strict=True)]
    for _ in range(ANYWHERE):
        top, left = (int(torch.randint(most + 1, (), generator=generator)) for most in room)
        yield top, left
