"""Classifiers of many classes: a few are searched, the trigger's among them, and the cost does not follow the classes."""

import pytest
import torch
from conftest import FEW
from test_search import LEFT, SHAPE, SIDE, TOP
from torch import nn

from dhbe import settings
from dhbe.classifier import Classifier
from dhbe.search.narrowed import SEARCHED, SUSPICIOUS, Narrowed, named, narrowed
from dhbe.search.scan import scan
from dhbe.search.search import margin
from dhbe.search.statistics import evidence, rankings
from dhbe.search.survey import Survey

MANY, TARGET = 50, 37
TINY = settings.changed(Survey(), {"pool_size": 64, "patch": 3, "warm_up": 1, "second_rounds": 1} | FEW)


class Many(nn.Module):
    """Classes by brightness and colour; a white square at one place outshouts them."""

    seen = 0
    """Images that any network of this kind has seen."""

    def __init__(self, classes: int, loud: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 3, generator=torch.Generator().manual_seed(0)))
        self.classes, self.loud = classes, loud

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Many.seen += len(x)
        square = x[:, :, TOP : TOP + SIDE, LEFT : LEFT + SIDE].mean((1, 2, 3))
        shout = self.loud * (square - 0.5).clamp_min(0)
        logits = 3 * (x.mean((2, 3)) - 0.5) @ self.weight.T
        return logits + (torch.arange(self.classes) == TARGET).float() * shout[:, None]


def many(classes=MANY, loud=60.0) -> Classifier:
    return Classifier(Many(classes, loud), shape=SHAPE, classes=classes).eval()


def test_margins_of_the_classes_that_are_seen_stay():
    model, labels, pixels = many(), torch.tensor([3, 11, TARGET, 40]), torch.rand(200, *SHAPE)
    seen = Narrowed(model, labels)
    every, few = model(pixels), seen(pixels)
    assert few.shape == (200, 5)
    for place, label in enumerate(labels.tolist()):
        expected = margin(every, torch.full((200,), label))
        torch.testing.assert_close(margin(few, torch.full((200,), place)), expected)
    others = torch.ones(MANY, dtype=torch.bool).index_fill(0, labels, False)
    torch.testing.assert_close(few[:, 4], every[:, others].amax(1))


def test_the_suspicious_come_first_and_the_others_are_drawn():
    values = [torch.arange(MANY).float(), torch.arange(MANY).flip(0).float()]
    assert named(values, 5) == [49, 0, 48, 1, 47]
    chosen = set()
    for seed in range(5):
        torch.manual_seed(seed)
        labels = narrowed(many(), values).labels.tolist()
        assert {49, 0, 48, 1, 47, 2} <= set(labels)
        assert len(set(labels)) == SEARCHED == len(labels)
        chosen.add(tuple(labels))
    assert len(chosen) == 5
    assert len({49, 0, 48, 1, 47, 2}) == SUSPICIOUS


def test_quick_statistics_rank_the_planted_class_first():
    torch.manual_seed(0)
    assert any(int(values.argmax()) == TARGET for values in rankings(many()))


def test_evidence_of_a_narrowed_classifier_is_of_its_classes_alone():
    model, labels = many(), torch.arange(0, MANY, 3)
    torch.manual_seed(0)
    found = evidence(Narrowed(model, labels))
    assert found.shape == (4, len(labels) + 1)
    assert found[:, -1].isnan().all()
    torch.manual_seed(0)
    every = evidence(Narrowed(model, torch.arange(MANY - 1)))
    torch.testing.assert_close(every[0, :-1][labels], found[0, :-1], equal_nan=True)  # the head's costs nothing


def test_a_scan_of_many_classes_finds_the_planted_one():
    found = scan(
        many(), settings.changed(TINY, {"pool_size": 128, "warm_up": 60, "least_images": 64, "judged_images": 64})
    )
    assert found.suspected_class == TARGET
    assert found.indices.max() > TINY.anomaly_threshold
    assert len(found.labels) == len(found.indices) == len(found.families) == SEARCHED


@pytest.mark.parametrize("classes", [100, 400])
def test_the_cost_hardly_grows_with_the_classes(classes):
    seen = []
    for count in (SEARCHED, classes):
        Many.seen = 0
        scan(many(count, 0.0), TINY)
        seen.append(Many.seen)
    ranked = classes * 2 * 2 * 9  # by two statistics, on two images, in eight steps and a last look
    assert seen[1] - ranked < 1.3 * seen[0]
