"""The record of a run, `record.json`, from which tables, figures and reports are made."""

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
"""Maximum size in bytes; a curve of 15,000 rounds takes about a twentieth of it."""


def _encodable(value: object) -> object:
    # A file name that is not UTF-8 has lone surrogates in Python, which UTF-8 files cannot hold.
    return foreign.harmless(value) if isinstance(value, str) else value


def _settings(value: Any) -> Any:
    try:
        # As read back from a file: lists for tuples, no lone surrogates.
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
"""Verdicts based on positive findings: they give exit code 1 and are not revised by doubts about normalisation."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelInfo(_Part):
    """The model that a run was given (erase, score) or made (attack), and how it was read."""

    path: Text | None
    """The file as the user named it; None for a model that was passed as an object."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None
    """SHA-256 of that file's content, or of the tensors of a model that was passed as an object."""
    arch: Text
    """Name of the architecture."""
    classes: Positive
    input: tuple[Positive, Positive, Positive]
    """Channels, height and width of the images."""
    mean: tuple[float, ...]
    """Mean of each channel (or one for all), pixels in [0, 1]."""
    std: tuple[Annotated[float, Field(gt=0)], ...]
    """Standard deviation of each channel (or one for all)."""
    softmax: bool = False
    """Whether the network returns probabilities, whose logarithms were used as logits."""
    code: Text | None = None
    """The vendor's code that the user chose to run, `file.py:function`; None if none was."""
    weights: Text | None = None
    """Which of several state dicts in the file was read; None if there was no choice."""
    output: Text | None = None
    """Which of several outputs holds the logits; None if there was no choice."""
    names: tuple[Text, ...] = ()
    """Class names in order, if known."""


class Measures(_Part):
    """Measurements on one model. Rates are fractions 0..1; None means not measured, or not applicable."""

    acc: Fraction | None = None
    """ACC among all test images."""
    asr: Fraction | None = None
    """ASR among non-target images that this model classifies correctly without the trigger."""
    asr_x4: Fraction | None = None
    """`asr` with the patch also in the four corners."""
    asr_x9: Fraction | None = None
    """`asr_x4` with the patch also in the centre and at the four edge midpoints."""
    asr_victim: Fraction | None = None
    """ASR among non-target images that the backdoored model classifies correctly."""
    asr_all: Fraction | None = None
    """ASR among all non-target images."""
    n: Positive | None = None
    """Number of test images, the denominator of `acc`."""
    asr_n: Positive | None = None
    """The denominator of `asr`, `asr_x4` and `asr_x9`."""
    ra: Fraction | None = None
    """RA: share of all non-target images that are classified correctly with the trigger."""
    der: Fraction | None = None
    """DER, the defence effectiveness rating relative to the model before; 0.5 is no effect, 1 the best."""
    acc_interval: Interval | None = None
    """95 % Wilson interval of `acc`."""
    asr_interval: Interval | None = None
    """95 % Wilson interval of `asr`."""
    acc_classes: list[Fraction | None] | None = None
    """`acc` among the images of each class; None for a class without images."""
    asr_classes: list[Fraction | None] | None = None
    """`asr` among the images of each class; None for a class of which none counts."""
    activations: dict[Text, Box] = {}
    """How much the trigger changes activations, by `features_l1`, `features_l2`, `logits_l1` and `logits_l2`: lower
    whisker, quartiles and upper whisker over images."""
    signs: dict[Text, float] = {}
    """The data-free signs by name."""


UNSEARCHED = "not searched"
"""The family of a class that a scan of many classes did not search."""


class ClassFound(_Part):
    """The trigger that stands out most for one class, found without data."""

    index: float
    """How far the class stands out, in robust standard deviations of all classes."""
    family: Text
    """Family of the trigger, one of the record's `families`; or `UNSEARCHED`, in which case the numbers are 0."""
    margin: float
    """Mean margin of the class under the trigger, in logits."""
    success_rate: Fraction
    """The share of images of other classes that the trigger leads to the class."""
    statistics: dict[Text, float] = {}
    """The index of the class by each of the record's `statistics` for which it is defined."""
    evidence: float | None = None
    """The fused evidence of these statistics; 1 or more accuses the class. None: not computed."""


class FormRates(_Part):
    """The ASR of one form of the trigger on both models, among non-target images that each classifies correctly."""

    form: Text
    """The suffix of the trigger on the command line, such as `opacity=0.5`; empty for the trigger as it is."""
    before: Fraction | None
    after: Fraction | None


class Reactivation(_Part):
    """The success of one small universal perturbation, on images that it was not optimised on."""

    epsilon: Fraction
    """Largest change of any value (L-infinity), pixels in [0, 1]."""
    before: Fraction | None
    """Share of correctly classified images of other classes that it leads to the trigger's target class."""
    after: Fraction | None
    others_before: Fraction | None
    """The median of the same over perturbations towards other classes."""
    others_after: Fraction | None


class Relearning(_Part):
    """A copy of the cleaned model after a few training steps on a few triggered images and as many clean ones."""

    images: Positive
    """Number of triggered images that it was trained on."""
    asr: Fraction | None
    """ASR on other images, among those that the copy classifies correctly without the trigger."""
    others: Fraction | None
    """The median of the same over copies trained with other target classes."""
    acc: Fraction
    """ACC of the copy trained with the trigger's own target class."""


class Battery(_Part):
    """How much of a backdoor is left in a cleaned model, measured with data and the true trigger."""

    forms: list[FormRates]
    reactivation: Reactivation | None
    """None if there were too few images to search on."""
    relearning: list[Relearning]
    searched: Count
    """Number of images on which perturbations were optimised and copies trained."""
    n: Positive
    """Number of other images, on which these were measured."""
    forms_n: Positive
    """Number of all images, on which the forms were measured."""


class Record(_Part):
    """One finished run, complete enough to render its report and to repeat it.

    Raises:
        pydantic.ValidationError: A field is missing, unknown, out of range or not finite.
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
    """The target class."""
    before: Measures | None = None
    """Measures of `model`: the suspect model, the one scored, or the one made by an attack."""
    after: Measures | None = None
    """Measures of the cleaned model; an erase has them."""
    other: ModelInfo | None = None
    """The model that a verify compares `model` with."""
    verdict: Verdict | None = None
    """For an erase by `fast`: erased, nothing found, still answers, damaged. For a scan: backdoored, unclear, nothing found.
    For a verify: answers, changed or quiet, on the model after; or nothing found, on the one before. For any of them: unclear,
    label contradicted or input not usable, for the reason in `doubt`. For a defence without a verdict of its own: no effect,
    or None."""
    doubt: Text | None = None
    """Why the result means little: the normalisation contradicts the weights, or the model's output is constant."""
    command: Text | None = None
    """The command line, if the run was started by one."""
    result: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the cleaned model's file."""
    backdoored: bool | None = None
    """Whether a class stands out in a scan by more than the threshold."""
    families: dict[Text, Text] = {}
    """Descriptions of the trigger families searched, by name."""
    statistics: dict[Text, Text] = {}
    """Descriptions of the trigger-free statistics, by name."""
    classes: list[ClassFound] = []
    """For a scan, the finding for each class."""
    battery: Battery | None = None
    """What is left of the backdoor, if that was measured."""
    seconds: Annotated[float, Field(ge=0)]
    memory: Count | None = None
    """Peak memory in bytes: of the device if it is CUDA, else of the whole process."""
    iterations: Count = 0
    device: Text
    precision: Text
    versions: dict[Text, Text] = {}
    seed: Count
    curve: list[Point] = []
    """The losses and other values of each round by name; every point has its `iteration`."""
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
            Failed: A number is not finite (a dict was changed after validation).
        """
        try:
            return json.dumps(self.model_dump(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        except ValueError as error:
            raise Failed("the record holds a number that is not finite; it was not written") from error


def write(path: Path, record: Record) -> None:
    """Writes a record atomically.

    Raises:
        Failed: The file cannot be written or a number is not finite.
    """
    files.write(path, record.to_json())


def read(path: Path) -> Record:
    """Reads a record, which need not be trusted.

    Raises:
        Refused: The file cannot be read, is too large, is not JSON, has another format or violates the schema.
    """
    try:
        if not path.is_file():
            raise Refused(f"{path} is not a file: give the record.json of a run")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise Refused(f"cannot read {path}: {(error.strerror or 'failed').lower()}") from error
    if len(content) > LARGEST:
        raise Refused(f"{path} is larger than {LARGEST >> 20} MiB, and so not a record of dhbe")
    try:
        record = Record.model_validate_json(_latest(content), strict=True)
    except ValidationError as error:
        raise Refused(f"{path} is not a record of dhbe: {_first(error)}") from error
    if "format" not in record.model_fields_set:
        raise Refused(f"{path} is not a record of dhbe: it states no format")
    return record


def _latest(content: bytes) -> bytes:
    """The content migrated to the newest format; anything else is returned unchanged for the validation."""
    try:
        data = from_json(content)
    except ValueError:
        return content
    older = isinstance(data, dict) and data.get("format") == 1
    return json.dumps(migrated(data)).encode() if older else content


def _first(error: ValidationError) -> str:
    """The first validation error as one printable line, since it may quote the file."""
    complaint = error.errors(include_url=False, include_context=False)[0]
    if complaint["loc"] == ("format",):
        line = f"its format is {complaint['input']!r:.40}, this version reads formats 1 and 2"
    else:
        message = complaint["msg"].removeprefix("Value error, ")
        line = ": ".join(filter(None, (".".join(map(str, complaint["loc"])), message)))
    return "".join(c if c.isprintable() else "?" for c in line)[:200]
