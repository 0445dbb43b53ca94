"""Puts the numbers of a record into words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dhbe.evaluation.metrics import wilson
from dhbe.flags import told
from dhbe.records import Battery, Measures, Record
from dhbe.report.words import percent

WEAK = 0.1
"""ASR below which a trigger counts as suppressed in the headline."""
COSTLY = 0.05
"""Loss of accuracy above which the headline mentions a cost."""

RATES = (
    ("acc", "Accuracy (ACC)", "Among all test images."),
    ("asr", "Attack success rate (ASR)", "Among non-target images that the evaluated model classifies correctly without the trigger."),
    ("asr_x4", "ASR, amplified ×4", "The same patch also in the four corners."),
    ("asr_x9", "ASR, amplified ×9", "Also in the centre and at the four edge midpoints."),
    ("asr_victim", "ASR, suspect's images", "Among non-target images that the suspect model classifies correctly without the trigger."),
    ("asr_all", "ASR, all images", "Among all non-target images, classified correctly or not."),
)  # fmt: skip
"""Field of `Measures`, name, and which images count."""


RULE = (
    f"The headline follows the strongest measured form of the trigger (ASR, ×4, ×9): suppressed is below {WEAK:.0%}; "
    f"a loss of accuracy above {100 * COSTLY:.0f} points counts as a cost."
)
UNKNOWN = "No data were given: accuracy (ACC) and attack success rate (ASR) are unknown."


@dataclass(frozen=True)
class Rate:
    """A fraction measured on `n` images; either may be unknown."""

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
        """The 95 % Wilson interval as text, or an empty text if unknown."""
        if self.value is None or self.n is None:
            return ""
        hits = min(round(self.value * self.n), self.n)  # a float beyond 2**53 may round above n
        low, high = wilson(hits, self.n)
        return f"{100 * low:.1f} to {100 * high:.1f}%"


@dataclass(frozen=True)
class Verdict:
    """A headline and its tone, sentences, and the rule behind the headline."""

    tone: "Tone"
    headline: str
    sentences: Sequence[str]
    rule: str = ""


def strongest_form(battery: Battery) -> str:
    """A sentence on the form of the trigger with the largest effect on the cleaned model."""
    counted = [each for each in battery.forms if each.after is not None]
    if not counted:
        return "The cleaned model classifies no image correctly, so no form of the trigger can be measured."
    worst = max(counted, key=lambda each: each.after or 0.0)
    what = f"The form {worst.form}" if worst.form else "The trigger as it is"
    return f"{what} has the largest effect on the cleaned model: it leads {percent(worst.after)} of the images to the target class."


Tone = Literal["good", "caution", "bad", "unknown"]

HEADLINES: dict[str, tuple[Tone, str]] = {
    "erased": ("good", "Erased"),
    "nothing found": ("unknown", "Nothing was found by this search"),
    "still answers": ("bad", "The cleaned model still answers a trigger"),
    "damaged": ("bad", "The cleaned model is damaged"),
    "no effect": ("bad", "The defence had no effect"),
    "backdoored": ("bad", "A backdoor was found"),
    "unclear": ("caution", "It is unclear whether there is a backdoor"),
    "label contradicted": ("caution", "The file's label contradicts its weights"),
    "input not usable": ("caution", "The input is not usable"),
    "answers": ("bad", "The model after still answers a trigger"),
    "changed": ("caution", "No trigger found acts any more, but the model has become a different one"),
    "quiet": ("good", "No trigger found acts on the model after"),
}
"""Tone and headline of a verdict."""

NEXT = {
    "erased": "Next: measure the cleaned model's accuracy on your own images before use, and compare both files with dhbe verify.",
    "nothing found": "Next: there may be a backdoor of a kind that is not searched for. With clean images, try dhbe defend.",
    "still answers": "Next: use neither file. Try another --seed or, with clean images, dhbe defend.",
    "damaged": "Next: do not use the cleaned file. Check --mean and --std, then try a lower --lr or another --seed.",
    "no effect": "Next: try another defence, or other settings of this one.",
    "backdoored": "Next: run dhbe erase to get a model that ignores the triggers found.",
    "unclear": "Next: give --mean and --std, or scan again with another --seed; dhbe erase does no harm.",
    "label contradicted": "Next: find out who wrote the label, and give --mean and --std yourself.",
    "input not usable": "Next: fix what the line above names, and run again.",
    "answers": "Next: use neither model. Try dhbe erase with another --seed or, with clean images, dhbe defend.",
    "changed": "Next: measure the accuracy of the model after on your own images.",
    "quiet": "Next: measure the accuracy of the model after on your own images before use.",
}
"""The recommended next step by verdict."""

INDEX = "The index is how far a class stands out, in robust standard deviations of all classes"


def line(record: Record) -> str:
    """The result of a run in one line, for the terminal, the page and `--json`."""
    if record.doubt:
        return f"{record.verdict}: {record.doubt}"
    before, after = record.before or Measures(), record.after or Measures()
    signs = before.signs
    label, index = f"class {signs.get('suspected_class', 0):.0f}", f"index {signs.get('anomaly_index', 0):.1f}"
    measured = _rates(before, after if record.after else None)
    if record.kind == "attack":
        return f"planted: {measured}" if before.asr is not None else f"trained: {measured}"
    if record.kind == "scan":
        chance = f"{index}, probability {percent(signs.get('probability'))} if half of all models are backdoored"
        return {
            "backdoored": f"backdoored: {label} stands out ({chance})",
            "unclear": f"unclear: {label} stands out somewhat ({chance})",
        }.get(record.verdict or "", f"nothing found: no class stands out; {label} comes closest ({chance})")
    if record.kind == "verify":
        led = percent(after.signs.get("success_rate"))
        return {
            "answers": f"still answers: the strongest trigger found in the model before leads {led} of the images to {label} in the model after",
            "changed": "changed: the model after responds to no trigger found, but has become a different model",
            "quiet": f"quiet: the model after responds to no trigger found ({led} of the images go to {label})",
        }.get(
            record.verdict or "",
            "nothing found: no backdoor was found in the model before, so there is nothing to verify",
        )
    limit = (record.defense or {}).get("anomaly_threshold")
    if record.verdict == "still answers" and isinstance(limit, int | float) and signs.get("anomaly_index", 0) <= limit:
        return (
            "still answers: statistics accuse a class, but no trigger for it was found, so nothing could be unlearned"
        )
    acted = f"{label} behaved like a target class ({index})"
    left = f"the strongest trigger found {{}} {percent(min(max(signs.get('gain', 0), 0), 1))} of the images there, alone or repeated"
    said = {
        "erased": f"erased: {acted}; in the cleaned model {left.format('leads')}",
        "nothing found": f"nothing found: no class stood out ({label} came closest, {index}), so little was changed",
        "still answers": f"still answers: {acted}, and in the cleaned model {left.format('still leads')}",
        "damaged": f"damaged: the cleaned model agrees with the suspect model on only {percent(after.signs.get('agreement'))} of generated images",
        "no effect": "no effect",
    }.get(record.verdict or "", "done")
    return (
        f"{said}; {measured}"
        if measured
        else said
        if record.verdict
        else f"{said}: nothing was measured, as no data were given"
    )


def _rates(before: Measures, after: Measures | None) -> str:
    """ACC and ASR as text, as far as they were measured."""
    pairs = (("ASR", before.asr, after and after.asr), ("ACC", before.acc, after and after.acc))
    told = [
        f"{name} {percent(old)}" + (f" to {percent(new)}" if after else "")
        for name, old, new in pairs
        if old is not None
    ]
    return ", ".join(told)


def erased(record: Record) -> Verdict:
    """The verdict on an erasure: the run's own if it is bad or nothing was measured, else that of the measurements."""
    assert record.before is not None
    assert record.after is not None
    assert record.verdict is not None
    tone, headline = HEADLINES[record.verdict]
    measured = verdict(record.kind, [record.before, record.after])
    said = (
        f"The run's own verdict, without data: {line(record)}." if record.verdict != "no effect" else f"{line(record)}."
    )
    next_ = told(NEXT[record.verdict], record.command)
    if tone in ("good", "unknown") and measured.tone != "unknown":
        return Verdict(measured.tone, measured.headline, [*measured.sentences, said, next_], measured.rule)
    return Verdict(tone, headline, [f"{said[0].upper()}{said[1:]}", next_, *measured.sentences], measured.rule)


def verdict(kind: str, states: Sequence[Measures]) -> Verdict:
    """The verdict by measurements alone.

    Args:
        kind: Kind of the record.
        states: Measures of one model, or of two: before and after.
    """
    if len(states) == 1:
        return _measured(kind, states[0])
    before, after = states
    if before.asr is None or after.asr is None:
        return Verdict("unknown", "The effect on a real trigger was not measured", [*_unmeasured(before, after)])
    return Verdict(*_judged(before, after), [*_compared(before, after)], RULE)


LIMITS = (
    "A search finds patches, small patterns and faint patterns over the whole image. It does not find warps, "
    "reflections, strong stripes or triggers that depend on the image. Of two classes none "
    "can stand out, and of three or four one may by chance."
)


def searched(record: Record) -> Verdict:
    """The verdict of a data-free search."""
    assert record.before is not None
    assert record.verdict is not None
    signs = record.before.signs
    tone, headline = HEADLINES[record.verdict]
    said = line(record)
    sentences = [f"{said[0].upper()}{said[1:]}.", told(NEXT[record.verdict], record.command)]
    limit = (record.defense or {}).get("anomaly_threshold")
    level = f"; above {limit:g}, the model counts as backdoored" if isinstance(limit, int | float) else ""
    sentences.append(f"{INDEX}{level}.")
    if record.kind == "scan":
        sentences.append(
            "The probability is that of a backdoor if half of all models had one. It was fitted on small classifiers, "
            "some of which have backdoors that no search finds."
        )
    elif record.after is not None:
        after = record.after.signs
        sentences.append(
            f"The strongest trigger found leads {percent(signs.get('success_rate'))} of the images to the class in the model "
            f"before; in a fresh search of the model after, the class stands out by {after.get('found_again', 0):.1f}. "
            f"Both models agree on {percent(after.get('agreement'))} of the images."
        )
    return Verdict(tone, headline, sentences, LIMITS)


def _measured(kind: str, state: Measures) -> Verdict:
    """The verdict on a single model."""
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
        yield f"On generated images, the cleaned model chooses the suspect model's class in {agreement} of cases."
    if "reaction" in after.signs:
        suspect = f", against {before.signs['reaction']:.3g} on the suspect model" if "reaction" in before.signs else ""
        yield f"Generated triggers change its logits by {after.signs['reaction']:.3g} on average{suspect}."
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
        return "caution", "The trigger is weakened, not gone"
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
        yield f"Amplified {form}, the trigger leads {percent(amplified[form])} of the images to the target class."


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
