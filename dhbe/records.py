"""The record of a run, `record.json`: all that tables, figures and reports are drawn from."""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from dhbe import files, foreign
from dhbe.errors import Failed, Refused
from dhbe.migration import migrated

LARGEST = 64 * 2**20
"""Bytes; a curve of 15,000 rounds takes about a twentieth of it."""


def _encodable(value: object) -> object:
    # A file name that is not UTF-8 reaches Python with lone surrogates, which no JSON file can hold.
    return foreign.harmless(value) if isinstance(value, str) else value


def _settings(value: Any) -> Any:
    try:
        # What a file would give back: lists for tuples, no lone surrogates.
        settings = foreign.values(json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not plain JSON: {error}") from error
    if settings is not None and not (isinstance(settings, dict) and isinstance(settings.get("name"), str)):
        raise ValueError('needs a "name"')
    return settings


def _point(point: dict[str, float]) -> dict[str, float]:
    iteration = point.get("iteration", -1.0)
    if iteration < 0 or not iteration.is_integer():
        raise ValueError('needs an "iteration", a whole number')
    return {**point, "iteration": int(iteration)}


def _utc(time: str) -> str:
    if datetime.fromisoformat(time).utcoffset() != timedelta(0):
        raise ValueError("not a time in UTC")
    return time


Text = Annotated[str, BeforeValidator(_encodable)]
Settings = Annotated[dict[str, Any] | None, BeforeValidator(_settings)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, lt=2**64)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Interval = tuple[Fraction, Fraction]
Box = tuple[float, float, float, float, float]
Point = Annotated[dict[Text, float], AfterValidator(_point)]
Verdict = Literal[
    "backdoored", "unclear", "nothing found", "answers", "changed", "quiet", "erased", "still answers", "damaged",
    "label contradicted", "input not usable", "no effect",
]  # fmt: skip

SEEN = ("backdoored", "still answers", "damaged", "answers", "changed")
"""Verdicts that tell of something that was seen: exit code 1, and no doubt about constants takes them back."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelInfo(_Part):
    """The model that a run was given (erase, score) or made (attack), and how it was read."""

    path: Text | None
    """The file as the user named it; None for a model that came as an object."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None
    """Of that file's content, or of the tensors of a model that came as an object."""
    arch: Text
    """Name of the architecture."""
    classes: Positive
    input: tuple[Positive, Positive, Positive]
    """Channels, height and width of the images."""
    mean: tuple[float, ...]
    """Of each channel (or one for all), pixels in [0, 1]."""
    std: tuple[Annotated[float, Field(gt=0)], ...]
    """The same of the standard deviation."""
    softmax: bool = False
    """The network returns probabilities; their logarithms were used as logits."""
    code: Text | None = None
    """The vendor's code that the user chose to run, `file.py:function`; None if none was."""
    weights: Text | None = None
    """Which of several state dicts in the file was read; None where nobody had to choose."""
    output: Text | None = None
    """Which of several outputs the logits are; None where nobody had to choose."""
    names: tuple[Text, ...] = ()
    """Names of the classes by their numbers, as far as the file or the user told them."""


class Measures(_Part):
    """What was measured on one model. Rates are fractions 0..1; None: not measured, or no such form."""

    acc: Fraction | None = None
    """Among all test images."""
    asr: Fraction | None = None
    """Among non-target images that this very model gets right without the trigger."""
    asr_x4: Fraction | None = None
    """`asr` with the patch also in the four corners."""
    asr_x9: Fraction | None = None
    """`asr_x4` with the patch also in the centre and at the four edge midpoints."""
    asr_victim: Fraction | None = None
    """Among non-target images that the backdoored model gets right."""
    asr_all: Fraction | None = None
    """Among all non-target images."""
    n: Positive | None = None
    """Test images: the denominator of `acc`."""
    asr_n: Positive | None = None
    """The denominator of `asr`, `asr_x4` and `asr_x9`."""
    ra: Fraction | None = None
    """Among all non-target images: still given their true class once triggered."""
    der: Fraction | None = None
    """Defence effectiveness against the model before; 0.5 is no effect, 1 the best."""
    acc_interval: Interval | None = None
    """95 % Wilson interval of `acc`."""
    asr_interval: Interval | None = None
    """95 % Wilson interval of `asr`."""
    acc_classes: list[Fraction | None] | None = None
    """`acc` among the images of each class; None for a class without images."""
    asr_classes: list[Fraction | None] | None = None
    """`asr` among the images of each class; None for a class of which none counts."""
    activations: dict[Text, Box] = {}
    """How far the trigger moves activations, by `features_l1`, `features_l2`, `logits_l1` and `logits_l2`: lower
    whisker, quartiles and upper whisker over images."""
    signs: dict[Text, float] = {}
    """The data-free signs by name."""


UNSEARCHED = "not searched"
"""The family of a class that a scan of many did not search."""


class ClassFound(_Part):
    """The trigger that stands out most for one class, found without data."""

    index: float
    """How far the class stands out, in robust standard deviations of all classes."""
    family: Text
    """Of the trigger, one of the record's `families`; or `UNSEARCHED`, and then the figures are 0."""
    margin: float
    """Of the class under it, in logits."""
    success_rate: Fraction
    """The share of the images of other classes that it leads there."""
    statistics: dict[Text, float] = {}
    """The index of the class by each of the record's `statistics` that can tell."""
    evidence: float | None = None
    """What these come to; from 1 on they accuse the class. None: not looked at."""


class FormRates(_Part):
    """What one form of the trigger does to both models: the ASR among non-target images that each gets right."""

    form: Text
    """What is written behind the trigger on the command line, as `opacity=0.5`; empty for the trigger as it is."""
    before: Fraction | None
    after: Fraction | None


class Reactivation(_Part):
    """How well one small perturbation of all images does what the trigger did, on images it was not searched on."""

    epsilon: Fraction
    """Largest change of any value (L-infinity), pixels in [0, 1]."""
    before: Fraction | None
    """Share of the images of other classes, classified right, that go to the trigger's target."""
    after: Fraction | None
    others_before: Fraction | None
    """The same with perturbations towards other classes, the median of them."""
    others_after: Fraction | None


class Relearning(_Part):
    """What a copy of the cleaned model learns of a few steps on a few triggered images and as many clean ones."""

    images: Positive
    """Triggered images that it learned from."""
    asr: Fraction | None
    """Among other images, those that the copy gets right untriggered."""
    others: Fraction | None
    """The same where the trigger was taught to lead to another class, the median of them."""
    acc: Fraction
    """Of the copy that was taught the trigger's own target."""


class Battery(_Part):
    """How much of a backdoor is left in a cleaned model, measured with data and the true trigger."""

    forms: list[FormRates]
    reactivation: Reactivation | None
    """None where there were too few images to search on."""
    relearning: list[Relearning]
    searched: Count
    """Images that perturbations were searched on and copies learned from."""
    n: Positive
    """Other images, on which that was measured."""
    forms_n: Positive
    """Images on which the forms were measured: all of these."""


class Record(_Part):
    """One finished run, whole: enough to draw its report and to repeat it.

    Raises:
        pydantic.ValidationError: A field that is missing, unknown, out of range or not finite.
    """

    format: Literal[2] = 2
    kind: Literal["erase", "attack", "score", "scan", "verify"]
    model: ModelInfo
    defense: Settings = None
    """`name` and every hyperparameter; an erase has one."""
    attack: Settings = None
    """`name` and every hyperparameter; an attack has one."""
    data: Text | None = None
    trigger: Text | None = None
    target: Count | None = None
    """The class that the trigger leads to."""
    before: Measures | None = None
    """Of `model`: the suspect one, the one scored, or the one that an attack made."""
    after: Measures | None = None
    """Of the cleaned model; an erase has one."""
    other: ModelInfo | None = None
    """The model that a verify compares `model` with."""
    verdict: Verdict | None = None
    """Of an erase by `fast`: erased, nothing found, still answers, damaged. Of a scan: backdoored, unclear, nothing found. Of a verify: the model after answers, has changed, or is quiet; or
    nothing was found in the one before. Of any of them: unclear, label contradicted or input not usable, for the reason in `doubt`. Of a defence that does not judge itself: no effect, or None."""
    doubt: Text | None = None
    """Why nothing that was or was not found means much: the constants contradict the weights, or the model answers to nothing."""
    command: Text | None = None
    """The command line, where the run was one."""
    result: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the cleaned model's file."""
    backdoored: bool | None = None
    """Whether a class stands out in a scan by more than the threshold."""
    families: dict[Text, Text] = {}
    """The kinds of triggers that were sought: what each is, by name."""
    statistics: dict[Text, Text] = {}
    """The statistics that need no trigger: what each is, by name."""
    classes: list[ClassFound] = []
    """Of a scan, for each class."""
    battery: Battery | None = None
    """What is left of the backdoor, where that was measured."""
    seconds: Annotated[float, Field(ge=0)]
    memory: Count | None = None
    """Peak in bytes: of the device where it counts them, else of the whole process."""
    iterations: Count = 0
    device: Text
    precision: Text
    versions: dict[Text, Text] = {}
    seed: Count
    curve: list[Point] = []
    """What each round came to, by name; every point has its `iteration`."""
    warnings: list[Text] = []
    finished: Annotated[str, AfterValidator(_utc)]
    """When the run ended: ISO 8601, UTC."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "erase" and (self.defense is None or self.before is None or self.after is None):
            raise ValueError("an erase needs defense, before and after")
        if self.kind in ("scan", "verify") and (self.verdict is None or self.before is None):
            raise ValueError(f"a {self.kind} needs verdict and before")
        if self.kind == "verify" and (self.other is None or self.after is None):
            raise ValueError("a verify needs other and after")
        if self.kind == "attack" and self.attack is None:
            raise ValueError("an attack needs attack")
        if self.target is not None and self.target >= self.model.classes:
            raise ValueError(f"there is no target {self.target} among {self.model.classes} classes")
        return self

    def to_json(self) -> str:
        """The content of `record.json`, keys in the order of the fields; equal records give equal text.

        Raises:
            Failed: A number is not finite any more (a dict was changed after it was validated).
        """
        try:
            return json.dumps(self.model_dump(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        except ValueError as error:
            raise Failed("the record holds a number that is not finite; it was not written") from error


def write(path: Path, record: Record) -> None:
    """Writes a record, whole or not at all.

    Raises:
        Failed: The file cannot be written or a number is not finite.
    """
    files.write(path, record.to_json())


def read(path: Path) -> Record:
    """Reads a record that may come from anywhere.

    Raises:
        Refused: The file cannot be read, is too large, is no JSON, has another format or breaks its rules.
    """
    try:
        if not path.is_file():
            raise Refused(f"{path} is not a file: give the record.json of a run")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise Refused(f"cannot read {path}: {(error.strerror or 'failed').lower()}") from error
    if len(content) > LARGEST:
        raise Refused(f"{path} is larger than {LARGEST >> 20} MiB: no record of ours is")
    try:
        record = Record.model_validate_json(_latest(content), strict=True)
    except ValidationError as error:
        raise Refused(f"{path} is no record of dhbe: {_first(error)}") from error
    if "format" not in record.model_fields_set:
        raise Refused(f"{path} is no record of dhbe: it states no format")
    return record


def _latest(content: bytes) -> bytes:
    """The same content in the newest format; what is no record of an older one stays for whoever validates it."""
    try:
        data = from_json(content)
    except ValueError:
        return content
    older = isinstance(data, dict) and data.get("format") == 1
    return json.dumps(migrated(data)).encode() if older else content


def _first(error: ValidationError) -> str:
    """The first complaint as one printable line; what it quotes comes from the file."""
    complaint = error.errors(include_url=False, include_context=False)[0]
    if complaint["loc"] == ("format",):
        line = f"its format is {complaint['input']!r:.40}, this version reads formats 1 and 2"
    else:
        message = complaint["msg"].removeprefix("Value error, ")
        line = ": ".join(filter(None, (".".join(map(str, complaint["loc"])), message)))
    return "".join(c if c.isprintable() else "?" for c in line)[:200]
