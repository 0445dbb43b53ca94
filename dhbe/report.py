"""A record as one self-contained HTML page: no script, no outside address, nothing a record could inject."""

import base64
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image
from torch import Tensor

from dhbe.errors import Refused
from dhbe.metrics import wilson
from dhbe.records import Battery, Box, Measures, Record

WEAK = 0.1
"""A trigger that leads a smaller share of the images to its target counts as suppressed in the headline."""
COSTLY = 0.05
"""A loss of accuracy above this counts as a cost in the headline."""

RATES = (
    ("acc", "Accuracy (ACC)", "Among all test images."),
    ("asr", "Attack success rate (ASR)", "Among non-target images that the evaluated model gets right untriggered."),
    ("asr_x4", "ASR, amplified ×4", "The same patch also in the four corners."),
    ("asr_x9", "ASR, amplified ×9", "Also in the centre and at the four edge midpoints."),
    ("asr_victim", "ASR, suspect's images", "Among non-target images that the suspect model gets right untriggered."),
    ("asr_all", "ASR, all images", "Among all non-target images, classified right or not."),
)
"""Field of `Measures`, name, what is counted."""

SIGNS = {
    "agreement": "Share of generated images for which the cleaned and the suspect model choose the same class.",
    "reaction": "Mean absolute change of the logits under generated triggers. Smaller is calmer.",
    "flips": "Share of generated images whose class changes under generated triggers.",
    "familiarity": "Distance of the generated images from what the model's BatchNorm layers remember of real ones.",
    "anomaly_index": "How far the class that stands out most does, in robust standard deviations of all classes.",
    "suspected_class": "That class, from 0.",
    "probability": "Of a backdoor, by the index, if half of all models have one.",
    "success": "Share of images that the strongest trigger found leads to that class.",
    "found_again": "How far the class stands out in a fresh search.",
    "drift": "How far BatchNorm means moved, in standard deviations.",
    **{
        f"{aim}_{name}": what.format(kind)
        for aim, what in (
            ("targeted", "Largest share of images that one trigger leads to one class, found in this model: {}."),
            ("untargeted", "Share of images whose class one trigger changes, found in this model: {}."),
        )
        for name, kind in (
            ("patches", "a patch anywhere"),
            ("masked", "few pixels"),
            ("masked_half", "fewer pixels"),
            ("faint", "a faint pattern"),
        )
    },
}
"""What a sign means."""

CURVES = {
    "lead_patches": "How far patches at random places bring their classes to lead, in logits.",
    "lead_masked": "The same of patterns that show few pixels at one place.",
    "lead_masked_half": "The same with half as many pixels.",
    "lead_faint": "The same of faint patterns over the whole image.",
    "familiarity": "Distance of the generated images from the model's BatchNorm statistics.",
    "distillation": "Gap between the two models' logits on generated images. The student makes it small.",
    "restriction": "Change of the student's logits under generated triggers. The student makes it small.",
    "disagreement": "The gap again, as the image generator finds it. It seeks large values.",
    "reaction": "The change again, as the trigger generator finds it. It seeks large values.",
    "margin": "How far a class leads under the patch that seeks it, in logits, over all classes. The patches raise it.",
    "loss": "The loss that training makes small.",
    "mask": "Size of the smallest trigger found, in pixels.",
    "success": "Share of images that the triggers found bring to their class.",
    "agreement": "Share of images for which the cleaned and the suspect model choose the same class.",
    "index": "Anomaly index of the smallest trigger. Above 2 is suspicious.",
    "pruned": "Share of the channels or filters that were pruned.",
}
"""What a curve means."""

ACTIVATIONS = {
    "features_l1": "Penultimate features, L1 norm.",
    "features_l2": "Penultimate features, L2 norm.",
    "logits_l1": "Logits, L1 norm.",
    "logits_l2": "Logits, L2 norm.",
}
"""What moved under the trigger, and how it is measured."""

PICTURES = {
    "samples": "Images that the method looked at: generated from the model alone, or pieces of two public photographs.",
    "triggers": "Triggers found or generated, which the cleaned model learned to ignore.",
    "trigger": "The trigger on an empty image.",
    "stamped": "Images with the trigger.",
    "found": "The trigger found for the class that stands out most, on a grey image.",
    "found_each": "The trigger found for each class, from class 0 on.",
}
"""What a picture shows."""

ACCENT, INK = "#0a7e8d", "#010203"  # stand-ins in the charts for the page's colours
LIMIT = 1e37  # of what is drawn, so that a diverged run has a chart too
GAP = 2  # pixels between the images of a grid

RULE = (
    f"The headline follows the strongest measured form of the trigger (ASR, ×4, ×9): suppressed is below {WEAK:.0%}; "
    f"a loss of accuracy above {100 * COSTLY:.0f} points is a cost."
)
UNKNOWN = "No data were given: accuracy (ACC) and attack success rate (ASR) are unknown."


@dataclass(frozen=True)
class Rate:
    """A fraction that was counted on `n` images, either of them perhaps unknown."""

    value: float | None
    n: int | None

    @classmethod
    def of(cls, measures: Measures, field: str) -> "Rate":
        """One of the rates of `RATES`."""
        denominators = {"acc": measures.n, "asr": measures.asr_n, "asr_x4": measures.asr_n, "asr_x9": measures.asr_n}
        return cls(getattr(measures, field), denominators.get(field))

    def __str__(self) -> str:
        return percent(self.value)

    @property
    def interval(self) -> str:
        """Its 95 % Wilson interval in words, or nothing."""
        if self.value is None or self.n is None:
            return ""
        hits = min(round(self.value * self.n), self.n)  # a float beyond 2**53 may round above n
        low, high = wilson(hits, self.n)
        return f"{100 * low:.1f} to {100 * high:.1f}%"


@dataclass(frozen=True)
class Verdict:
    """What the numbers say: a headline and its tone, sentences, and the rule behind the headline."""

    tone: Literal["good", "caution", "bad", "unknown"]
    headline: str
    sentences: Sequence[str]
    rule: str = ""


def render(record: Record, pictures: Mapping[str, bytes] = MappingProxyType({})) -> str:
    """Draws the report of a run from its record alone; equal records give equal pages.

    Args:
        record: The record. Every text in it is treated as hostile.
        pictures: PNG files by name; those in `PICTURES` have captions.

    Returns:
        The HTML page.
    """
    states = [measures for measures in (record.before, record.after) if measures is not None] or [Measures()]
    rates = [(name, note, [Rate.of(state, field) for state in states]) for field, name, note in RATES]
    return _template().render(
        record=record,
        verdict=verdict(record.kind, states) if record.verdict is None else searched(record),
        heads=_heads(states),
        rates=rates,
        measured=any(rate.value is not None for _, _, pair in rates for rate in pair),
        strongest=strongest_form(record.battery) if record.battery else None,
        signs=[(name, SIGNS.get(name), [state.signs.get(name) for state in states]) for name in _names(states)],
        moved=[(name, note, boxplot(boxes)) for name, note in ACTIVATIONS.items() if (boxes := _boxes(states, name))],
        curves=[(name, CURVES.get(name), chart(points)) for name, points in series(record.curve)],
        pictures=[(name, PICTURES.get(name), base64.b64encode(png).decode()) for name, png in pictures.items()],
    )


def strongest_form(battery: Battery) -> str:
    """Which form of the trigger does most to the cleaned model, in a sentence."""
    counted = [each for each in battery.forms if each.after is not None]
    if not counted:
        return "The cleaned model gets no image right, so that no form of the trigger counts."
    worst = max(counted, key=lambda each: each.after or 0.0)
    what = f"The form {worst.form}" if worst.form else "The trigger as it is"
    return f"{what} does most to the cleaned model: it leads {percent(worst.after)} of the images to the target."


def _template() -> jinja2.Template:
    folder = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    page = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters |= {
        "duration": duration,
        "moment": moment,
        "setting": setting,
        "rate": lambda value: Rate(value, None),
    }
    return page.get_template("report.html")


def _heads(states: Sequence[Measures]) -> list[str]:
    return ["Suspect", "Cleaned"] if len(states) == 2 else ["Measured"]


def _boxes(states: Sequence[Measures], name: str) -> dict[str, Box]:
    """The activation differences of a name, by the head of their column."""
    pairs = zip(_heads(states), states, strict=True)
    return {head: state.activations[name] for head, state in pairs if name in state.activations}


def _names(states: Sequence[Measures]) -> Iterable[str]:
    """The signs of all states, each once, in their order."""
    return dict.fromkeys(name for state in states for name in state.signs)


def verdict(kind: str, states: Sequence[Measures]) -> Verdict:
    """What the numbers say in words, and no more than they say.

    Args:
        kind: Of the record.
        states: One measured model, or two: before and after.
    """
    if len(states) == 1:
        return _measured(kind, states[0])
    before, after = states
    if before.asr is None or after.asr is None:
        return Verdict("unknown", "The effect on a real trigger was not measured", [*_unmeasured(before, after)])
    return Verdict(*_judged(before, after), [*_compared(before, after)], RULE)


SEARCHED: dict[str, tuple[Literal["good", "caution", "bad", "unknown"], str]] = {
    "backdoored": ("bad", "A backdoor was found"),
    "unclear": ("caution", "It is unclear whether there is a backdoor"),
    "nothing found": ("good", "No backdoor was found"),
    "answers": ("bad", "The model after still answers a trigger"),
    "changed": ("caution", "No trigger found acts any more, but the model has become another one"),
    "quiet": ("good", "No trigger found acts on the model after"),
}
"""Tone and headline of what a search without data came to."""

LIMITS = (
    "A search finds patches, small patterns and faint patterns over the whole image. It does not find warps, reflections "
    "or triggers that depend on the image, and with fewer than about five classes none can stand out."
)


def searched(record: Record) -> Verdict:
    """What a search without data came to, in words."""
    assert record.before is not None
    assert record.verdict is not None
    signs = record.before.signs
    label, index = signs.get("suspected_class", 0), signs.get("anomaly_index", 0)
    said = [f"Class {label:.0f} stands out most, by {index:.1f} robust standard deviations."]
    if record.kind == "scan":
        tone, headline = SEARCHED[record.verdict]
        said.append(
            f"If half of all models were backdoored, one that stands out so far would be so with a probability of "
            f"{percent(signs.get('probability'))}; the curve was fitted to small classifiers of our own."
        )
        return Verdict(tone, headline, said, LIMITS)
    assert record.after is not None
    after = record.after.signs
    if record.verdict == "nothing found":
        tone, headline = "unknown", "No backdoor was found in the model before"
    else:
        tone, headline = SEARCHED[record.verdict]
        said.append(
            f"The strongest trigger found there leads {percent(after.get('success'))} of the images to that class in the "
            f"model after, against {percent(signs.get('success'))} before; in a fresh search the class stands out by "
            f"{after.get('found_again', 0):.1f}."
        )
    said.append(f"Both choose the same class for {percent(after.get('agreement'))} of the images.")
    return Verdict(tone, headline, said, LIMITS)


def _measured(kind: str, state: Measures) -> Verdict:
    """Of a model that nothing was done to."""
    if state.acc is None and state.asr is None:
        return Verdict("unknown", "Nothing was measured on real images", [UNKNOWN])
    what = "Backdoor planted" if kind == "attack" else "Measured"
    return Verdict(
        "unknown",
        f"{what}: accuracy {percent(state.acc)}, attack success rate {percent(state.asr)}",
        [f"{name} is {Rate.of(state, field)}{_counted(Rate.of(state, field))}." for field, name, _ in RATES[:2]],
    )


def _unmeasured(before: Measures, after: Measures) -> Iterator[str]:
    if after.acc is None and after.asr is None:
        yield UNKNOWN
    else:
        yield from _accuracy(before, after)
        yield "The attack success rate (ASR) was not measured both before and after."
    if "agreement" in after.signs:
        agreement = percent(after.signs["agreement"])
        yield f"On generated images the cleaned model chooses the suspect model's class in {agreement} of cases."
    if "reaction" in after.signs:
        suspect = f", against {before.signs['reaction']:.3g} on the suspect model" if "reaction" in before.signs else ""
        yield f"Generated triggers move its logits by {after.signs['reaction']:.3g} on average{suspect}."
    if "anomaly_index" in before.signs and "suspected_class" in before.signs:
        index, label = before.signs["anomaly_index"], before.signs["suspected_class"]
        yield f"In the search for triggers class {label:.0f} stands out most, by {index:.1f} robust standard deviations."
    yield "These are signs, not proof."


def _judged(before: Measures, after: Measures) -> tuple[Literal["good", "caution", "bad", "unknown"], str]:
    """Tone and headline by the strongest measured form of the trigger."""
    old, new = _strongest(before), _strongest(after)
    lost = 0.0 if before.acc is None or after.acc is None else before.acc - after.acc
    if max(old, new) < WEAK:
        return "unknown", "The trigger had little effect to begin with"
    if new < WEAK and lost <= COSTLY:
        return "good", "The trigger is suppressed"
    if new < WEAK:
        return "caution", "The trigger is suppressed, at a cost in accuracy"
    if new < old - WEAK:
        return "caution", "The trigger is weaker, not gone"
    return "bad", "The trigger works on the cleaned model"


def _strongest(measures: Measures) -> float:
    return max(rate for rate in (measures.asr, measures.asr_x4, measures.asr_x9, 0.0) if rate is not None)


def _compared(before: Measures, after: Measures) -> Iterator[str]:
    rate = Rate.of(after, "asr")
    yield f"The attack success rate (ASR) {_moved(Rate.of(before, 'asr'), rate)}{_counted(rate)}."
    yield from _accuracy(before, after)
    amplified = {form: rate for form, rate in (("×4", after.asr_x4), ("×9", after.asr_x9)) if rate is not None}
    if amplified:
        form = max(amplified, key=lambda form: amplified[form])
        yield f"Amplified {form}, the trigger leads {percent(amplified[form])} of the images to the target."


def _accuracy(before: Measures, after: Measures) -> Iterator[str]:
    if before.acc is None or after.acc is None:
        return
    points = 100 * (after.acc - before.acc)
    size = f"{abs(points):.1f} points" if abs(points) >= 0.05 else "less than 0.1 points"
    change = f"{size} {'lower' if points < 0 else 'higher'}" if points else "the same"
    old, new = Rate.of(before, "acc"), Rate.of(after, "acc")
    yield f"Accuracy (ACC) is {change}: {old} before, {new} after{_counted(new)}."


def _moved(old: Rate, new: Rate) -> str:
    if old.value == new.value:
        return f"stayed at {new}"
    return f"{'fell' if (new.value or 0) < (old.value or 0) else 'rose'} from {old} to {new}"


def _counted(rate: Rate) -> str:
    return "" if not rate.interval else f" (95% interval {rate.interval}, on {rate.n:,} images)"


def percent(value: float | None) -> str:
    """A fraction as text; what rounding would make none or all is said to be nearly that.

    >>> percent(0.9972), percent(0.0001), percent(0.9999), percent(0.0), percent(None)
    ('99.7%', '<0.1%', '>99.9%', '0.0%', '—')
    """
    if value is None:
        return "—"
    if 0 < value < 0.0005:
        return "<0.1%"
    if 0.9995 <= value < 1:
        return ">99.9%"
    return f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """A length of time as text.

    >>> duration(7.25), duration(125), duration(7260)
    ('7.2 s', '2 min 5 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def moment(time: str) -> str:
    """A time in ISO 8601 as text.

    >>> moment("2025-01-31T12:00:59.1Z")
    '2025-01-31 12:00 UTC'
    """
    return f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M} UTC"


def setting(value: object) -> str:
    """A hyperparameter as text.

    >>> setting(0.0005), setting([1, 2]), setting(False), setting("sample")
    ('0.0005', '[1, 2]', 'false', 'sample')
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def series(curve: list[dict[str, float]]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """The curve's quantities in order of appearance, each with its points (iteration, value)."""
    names = dict.fromkeys(name for point in curve for name in point if name != "iteration")
    for name in names:
        yield name, [(point["iteration"], point[name]) for point in curve if name in point]


def chart(points: list[tuple[float, float]]) -> Markup:
    """A line chart as inline SVG in the page's own colours; its only text is the numbers along its axes."""
    x, y = np.clip(np.asarray(points, dtype=np.float64).T, -LIMIT, LIMIT)
    if len(x) == 1:
        x, y = x + np.array([-0.25, 0.25]), y.repeat(2)  # a dash, for a point alone would not be seen

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
    """Boxes beside each other as inline SVG (fig. 7): whiskers, quartiles and median, each with its name below."""
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
    """An SVG file as part of a page: no prolog, address, style sheet or id; the page's width, font and colours."""
    box = re.search(r' viewBox="[\d. ]+"', svg)
    assert box is not None
    body = svg[svg.index(">", box.end()) + 1 :]
    body = re.sub(r"<defs>.*?</defs>| id=\"[^\"]*\"|font-family: [^;]*; ", "", body, flags=re.DOTALL)
    return f"<svg{box[0]}>{body}".replace(ACCENT, "var(--accent)").replace(INK, "currentColor")


def grid(images: Tensor, columns: int = 8, scale: int = 2) -> bytes:
    """Images side by side as a PNG file, row by row, with transparent gaps.

    Args:
        images: Floats [n, c, h, w] in [0, 1], c 1 or 3; what lies outside is clipped.
        columns: Images in a row.
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
