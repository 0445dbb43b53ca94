"""Time of measuring a classifier with a patch trigger as in `dhbe score`, against the former implementation.

Before, each rate had a pass over all images by the network as it came. Now BatchNorm is folded, weights lie channels-last,
and images that cannot count are not shown. Both must come to the same rates, or this fails.

    python -m timings.scoring
    python -m timings.scoring --arch resnet18 --images 10000 --repeats 3 --json results/speed/scoring_resnet18_cpu.json
"""

import sys
from dataclasses import replace

import torch

from dhbe.api.machine import keep_memory
from dhbe.attacks.triggers import badnets
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.evaluation import diagnostics, measuring, metrics
from dhbe.evaluation.evidence import Evidence
from dhbe.training import predict
from timings.defenses import CLASSES, SHAPE, victim
from timings.training import noise
from timings.turns import Work, arguments, compare

RIGHT = 0.93
"""The share of the images that the network classifies correctly."""

TIES = 1e-3
"""Tolerance for rates because of ties between classes, which are frequent in an untrained network."""


def classified(model: Classifier, count: int) -> Images:
    """Images of noise labelled with the network's predictions, except some."""
    images = noise(count)
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(count, generator=generator) > RIGHT
    labels = predict(model, images)
    return replace(images, labels=torch.where(wrong, (labels + 1) % CLASSES, labels))


def ours(model: Classifier, evidence: Evidence) -> Work:
    """Measures like `score`."""

    def work() -> list[float | None]:
        found = measuring.measured(model, evidence)
        return [found.acc, found.asr, found.asr_x4, found.asr_x9]

    return work


def plain(model: Classifier, evidence: Evidence) -> Work:
    """The same rates from passes over all images."""
    images, trigger, target = evidence.images, evidence.trigger, evidence.one_target
    assert trigger is not None
    assert target is not None

    def work() -> list[float | None]:
        clean = predict(model, images)
        forms = [form for form in (trigger, trigger.amplified(4), trigger.amplified(9)) if form]
        rates = [metrics.attack_success(clean, predict(model, images, form), images.labels, target) for form in forms]
        diagnostics.activation_differences(model, images.subset(slice(measuring.BOXED)), trigger)
        return [metrics.accuracy(clean, images.labels), *rates]

    return work


if __name__ == "__main__":
    args = arguments(__doc__.splitlines()[0], images=10_000, repeats=3)
    keep_memory()  # as the commands do
    model = victim(args.arch)
    images = classified(model, args.images)
    target = (int(images.labels.mode().values) + 1) % CLASSES
    evidence = Evidence(images, "noise", badnets(3, SHAPE), target)
    both = {who: make(model, evidence) for who, make in (("ours", ours), ("plain", plain))}
    rates = {who: work() for who, work in both.items()}
    pairs = zip(rates["ours"], rates["plain"], strict=True)
    if any(a is None or b is None or abs(a - b) > TIES for a, b in pairs):
        sys.exit(f"the two do not count alike: {rates}")
    compare(args, both)
