"""Measures a classifier's rates on the evidence; no defence sees any of this."""

from typing import Any, get_args

import torch
from torch import Tensor

from dhbe.attacks.triggers import Trigger
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.errors import Refused
from dhbe.evaluation import diagnostics, metrics
from dhbe.evaluation.evidence import Evidence
from dhbe.frozen import quick
from dhbe.records import Measures, ModelInfo
from dhbe.training import predict

BOXED = 1000
"""Maximum number of images for activation differences."""

WORTH = 512
"""Number of images from which optimising the network first pays off."""


def check(evidence: Evidence, info: ModelInfo) -> None:
    """Raises `Refused` unless images, trigger, target and model fit together."""
    images, target = evidence.images, evidence.target
    if images.shape != info.input:
        raise Refused(f"the images are {images.shape}, the model takes {info.input}: give other data or --input")
    if len(images) and int(images.labels.max()) >= info.classes:
        raise Refused(
            f"the data has labels up to {int(images.labels.max())}, the model has {info.classes} classes: give other data"
        )
    if (evidence.trigger is None) != (target is None):
        raise Refused("a trigger needs its target class, and vice versa: give both --trigger and --target, or neither")
    for what, number in (("target", evidence.one_target), ("source", evidence.source)):
        if number is not None and not 0 <= number < info.classes:
            raise Refused(f"no {what} class {number}: the model has classes 0 to {info.classes - 1}")


def measured(
    classifier: Classifier,
    evidence: Evidence | None,
    victim: Classifier | None = None,
    signs: dict[str, float] | None = None,
) -> Measures:
    """Measures everything that the evidence allows.

    Args:
        classifier: The classifier to evaluate.
        evidence: Images, and optionally a trigger with its target; None leaves all rates None.
        victim: The backdoored model, for the ASR among images that it classifies correctly; None means `classifier`.
        signs: Data-free signs to include.

    Returns:
        The measures; rates are in [0, 1]. An ASR is None if the model classifies no image correctly, so that none counts.

    Raises:
        Refused: The data has no image outside the target class.
        Failed: The classifier's logits are not finite.
    """
    if evidence is None:
        return Measures(signs=signs or {})
    images, trigger, target = evidence.images, evidence.trigger, evidence.target
    labels, classes = images.labels, images.classes
    if len(images) >= WORTH:
        classifier, victim = quick(classifier), victim and quick(victim)
    clean, every = predict(classifier, images), torch.ones_like(images.labels, dtype=torch.bool)
    rates: dict[str, Any] = {"acc": metrics.accuracy(clean, labels), "n": len(images)}
    rates["acc_classes"] = metrics.per_class(clean == labels, every, labels, classes)
    rates["acc_interval"] = metrics.wilson(int((clean == labels).sum()), len(images))
    if trigger is not None and target is not None:
        base = clean if victim is None else predict(victim, images)
        rates |= _success(classifier, evidence, trigger, metrics.goals(labels, target, classes), clean, base)
        shown = images.subset(slice(BOXED))
        moved = diagnostics.activation_differences(classifier, shown, trigger)
        rates["activations"] = {name: diagnostics.box(values) for name, values in moved.items()}
    return Measures(**rates, signs=signs or {})


def _success(
    classifier: Classifier, evidence: Evidence, trigger: Trigger, goal: Tensor, clean: Tensor, base: Tensor
) -> dict[str, Any]:
    """All rates on triggered images.

    Args:
        classifier: The classifier to evaluate.
        evidence: The images; with a source, only those of its class count.
        trigger: The trigger.
        goal: The target class of each image, int64 [n].
        clean: The classifier's predictions without the trigger, int64 [n].
        base: The victim's predictions without the trigger, int64 [n].
    """
    labels = evidence.images.labels
    ours = labels == evidence.source if evidence.source is not None else torch.ones_like(labels, dtype=torch.bool)
    aimed = ours & (labels != goal)  # no other images count
    triggered = _led(classifier, evidence.images, trigger, aimed)
    parts = (clean[ours], triggered[ours], labels[ours], goal[ours], base[ours])
    _, hit, true, aim, _ = parts
    right = {"model": parts[0], "victim": parts[4], "all": true}
    counted = {among: (seen == true) & (true != aim) for among, seen in right.items()}
    rates: dict[str, Any] = {}
    for among in get_args(metrics.Among):
        if counted[among].any() or among == "all":  # "all" raises if there are no images
            rates[f"asr_{among}"] = metrics.attack_success(*parts, among)
    rates["asr"] = rates.pop("asr_model", None)
    rates["ra"] = metrics.robust_accuracy(hit, true, aim)
    number = int(counted["model"].sum())
    for name, form in (("asr_x4", trigger.amplified(4)), ("asr_x9", trigger.amplified(9))):
        if form is not None and number:
            again = _led(classifier, evidence.images, form, aimed & (clean == labels))
            rates[name] = metrics.attack_success(parts[0], again[ours], true, aim)
    if number:
        rates["asr_classes"] = metrics.per_class(hit == aim, counted["model"], true, evidence.images.classes)
        rates["asr_interval"] = metrics.wilson(int(((hit == aim) & counted["model"]).sum()), number)
    rates["asr_n"] = number or None
    return rates


def _led(classifier: Classifier, images: Images, trigger: Trigger, which: Tensor) -> Tensor:
    """Predicted classes int64 [n] of the triggered images selected by `which`, bool [n]; -1 for the others."""
    found = torch.full_like(images.labels, -1)
    found[which] = predict(classifier, images.subset(which), trigger)
    return found


def rated(before: Measures, after: Measures) -> Measures:
    """`after` with the defence effectiveness rating (DER), if both models have ACC and ASR."""
    rates = [before.acc, after.acc, before.asr, after.asr]
    known = [rate for rate in rates if rate is not None]
    return after.model_copy(update={"der": metrics.der(*known)}) if len(known) == len(rates) else after
