"""Charts as inline SVG, and images as PNG files."""

import io
import re
from collections.abc import Callable, Mapping

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image
from torch import Tensor

from dhbe.errors import Refused
from dhbe.records import Box

ACCENT, INK = "#0a7e8d", "#010203"  # placeholders for the page's colours
LIMIT = 1e37  # values are clipped to this, so that a diverged run has a chart too
GAP = 2  # pixels between the images of a grid


def chart(points: list[tuple[float, float]]) -> Markup:
    """A line chart of points (x, y) as inline SVG in the page's colours; its only text is the numbers along its axes."""
    x, y = np.clip(np.asarray(points, dtype=np.float64).T, -LIMIT, LIMIT)
    if len(x) == 1:
        x, y = x + np.array([-0.25, 0.25]), y.repeat(2)  # a dash, as a single point would be invisible

    def draw(axes: Axes) -> None:
        axes.plot(x, y, color=ACCENT, linewidth=1.4, clip_on=False)
        if y.min() > 0 and y.max() > 100 * y.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=4))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    return _drawn(draw)


def boxplot(boxes: Mapping[str, Box]) -> Markup:
    """Box plots side by side as inline SVG (fig. 7): whiskers, quartiles and median, with the name below each."""
    parts = ("whislo", "q1", "med", "q3", "whishi")
    stats = [
        {**dict(zip(parts, np.clip(box, -LIMIT, LIMIT).tolist(), strict=True)), "label": name}
        for name, box in boxes.items()
    ]
    line = {"color": INK, "linewidth": 0.9}

    def draw(axes: Axes) -> None:
        axes.bxp(
            stats, showfliers=False, widths=0.45, boxprops=line, whiskerprops=line, capprops=line,
            medianprops={"color": ACCENT, "linewidth": 1.8},
        )  # fmt: skip
        axes.yaxis.set_major_locator(MaxNLocator(4))

    return _drawn(draw)


def _drawn(draw: Callable[[Axes], None]) -> Markup:
    """A drawing as inline SVG in the page's style."""
    with style.context(["default", {"svg.hashsalt": "dhbe", "svg.fonttype": "none", "font.size": 9}]):
        figure = Figure(figsize=(3.6, 1.9), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.7, clip_on=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=INK)
        svg = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    return Markup(_inlined(svg.getvalue()))  # noqa: S704 (matplotlib escapes texts)


def _inlined(svg: str) -> str:
    """An SVG file made inline: without prolog, URLs, style sheet and ids; with the page's width, font and colours."""
    box = re.search(r' viewBox="[\d. ]+"', svg)
    assert box is not None
    body = svg[svg.index(">", box.end()) + 1 :]
    body = re.sub(r"<defs>.*?</defs>| id=\"[^\"]*\"|font-family: [^;]*; ", "", body, flags=re.DOTALL)
    return f"<svg{box[0]}>{body}".replace(ACCENT, "var(--accent)").replace(INK, "currentColor")


def grid(images: Tensor, columns: int = 8, scale: int = 2) -> bytes:
    """Images in rows as a PNG file, with transparent gaps.

    Args:
        images: Floats [n, c, h, w] in [0, 1], c 1 or 3; values outside are clipped.
        columns: Images per row.
        scale: Pixels of the picture per pixel of an image.

    Raises:
        Refused: There are no images, or they have neither 1 nor 3 channels.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise Refused(f"a picture is drawn of images [n, 1 or 3, h, w], not {list(images.shape)}")
    pixels = images.detach().float().nan_to_num().clamp(0, 1).mul(255).round().byte().cpu()
    count, _, height, width = pixels.shape
    tiles = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy().repeat(scale, 1).repeat(scale, 2)
    down, right = scale * height + GAP, scale * width + GAP
    canvas = np.zeros((down * -(-count // columns) - GAP, right * min(count, columns) - GAP, 4), np.uint8)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        place = canvas[row * down :, column * right :][: scale * height, : scale * width]
        place[..., :3], place[..., 3] = tile, 255
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, "PNG")
    return file.getvalue()
