"""The trigger in all forms that an attacker could use without touching the model."""

from collections.abc import Callable, Iterator

import torch

from dhbe.attacks.triggers import Patch, Trigger
from dhbe.attacks.triggers.patch import CORNERS
from dhbe.errors import Refused

OPACITIES = (0.25, 0.5, 0.75, 1.5)
SIZES = (0.75, 1.5, 2.0)
ANYWHERE = 3
"""Places drawn at random beside the centre and the corners."""


def forms(trigger: Trigger, generator: torch.Generator) -> dict[str, Trigger]:
    """The trigger as it is, amplified, weaker and stronger, smaller and larger, and elsewhere.

    Args:
        trigger: The true one.
        generator: Draws the random places.

    Returns:
        The forms by what is written behind the trigger's name on the command line ("" for the trigger as it is).
        Those that this trigger does not have, or that look the same as it, are left out.
    """
    grey = torch.full((1, *trigger.shape), 0.5)
    found = {"": trigger}
    for make in _makers(trigger, generator):
        try:
            form = make()
        except Refused:  # too large for the image, or stronger than there is room for
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
    """Places at which the patch is whole, each as likely."""
    if not isinstance(trigger, Patch):
        return
    room = [side - (part.stop - part.start) for side, part in zip(trigger.shape[1:], trigger.box, strict=True)]
    for _ in range(ANYWHERE):
        top, left = (int(torch.randint(most + 1, (), generator=generator)) for most in room)
        yield top, left
