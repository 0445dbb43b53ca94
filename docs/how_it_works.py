"""Draws docs/how_it_works.svg, the course of `dhbe erase`: `python docs/how_it_works.py`."""

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OUT = Path(__file__).with_suffix(".svg")
TEAL, GREY, PAPER = "#0a6f86", "#5d6870", "#f4f7f8"
WIDTH, HEIGHT, GAP = 3.25, 1.75, 0.55
STEPS = (
    ("Suspect model", "weights only;\nno data, no trigger"),
    ("1  Images", "pieces of photographs, and\nimages made to fit its\nBatchNorm statistics"),
    ("2  Trigger inversion", "for each class, in each\nfamily: the trigger that\nraises its margin most"),
    ("3  Evidence", "which class stands out,\nby triggers and by statistics\nthat need none"),
    ("4  Restricted distillation", "a student copies the answers\nto clean images, and keeps\nthem under the triggers"),
    ("5  Fresh search", "of the student: does the\nclass still stand out?"),
    ("Cleaned model, report", "erased, nothing found,\nstill answers, damaged"),
)
"""Title and words of each box, in their order."""
ROWS = (4, 3)
"""Boxes in each row; the second runs from right to left."""


def box(axes: Axes, x: float, y: float, title: str, words: str, *, end: bool) -> None:
    """One step."""
    face = TEAL if end else PAPER
    axes.add_patch(
        mpl.patches.FancyBboxPatch(
            (x, y),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=.12",
            facecolor=face,
            edgecolor=TEAL,
            linewidth=1.2,
        )
    )
    axes.text(
        x + WIDTH / 2, y + HEIGHT - 0.35, title, ha="center", va="center", fontsize=11, weight="bold",
        color="white" if end else TEAL,
    )  # fmt: skip
    axes.text(
        x + WIDTH / 2, y + HEIGHT / 2 - 0.25, words, ha="center", va="center", fontsize=9.5, linespacing=1.35,
        color="white" if end else "#1b2227",
    )  # fmt: skip


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    """From one step to another."""
    axes.annotate(
        "", end, start,
        arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.3, "connectionstyle": f"arc3,rad={bend}"},
    )  # fmt: skip


def main() -> None:
    """Draws the picture."""
    mpl.rcParams["svg.hashsalt"] = "dhbe"
    pitch, lower = WIDTH + GAP, -HEIGHT - 1.1
    places = [(pitch * number, 0.0) for number in range(ROWS[0])]
    places += [(pitch * (ROWS[0] - 1 - number), lower) for number in range(ROWS[1])]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, ((x, y), (title, words)) in enumerate(zip(places, STEPS, strict=True)):
        box(axes, x, y, title, words, end=number in (0, len(STEPS) - 1))
    for (x, y), (to, down) in pairwise(places):
        if down != y:
            arrow(axes, (x + WIDTH / 2, y), (x + WIDTH / 2, down + HEIGHT))
        elif to > x:
            arrow(axes, (x + WIDTH, y + HEIGHT / 2), (to, y + HEIGHT / 2))
        else:
            arrow(axes, (x, y + HEIGHT / 2), (to + WIDTH, y + HEIGHT / 2))
    (left, _), (right, _) = places[5], places[4]
    arrow(axes, (left + WIDTH / 2, lower), (right + WIDTH / 2, lower), bend=0.25)
    axes.text((left + right + WIDTH) / 2, lower - 0.78, "yes: another cycle", ha="center", fontsize=9.5, color=GREY)
    axes.text(left - GAP / 2, lower + HEIGHT / 2 + 0.15, "no", ha="center", fontsize=9.5, color=GREY)
    axes.set_xlim(-0.1, pitch * ROWS[0] - GAP + 0.1)
    axes.set_ylim(lower - 1.0, HEIGHT + 0.1)
    axes.set_aspect("equal")
    axes.set_axis_off()
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
