"""Statistics that need no trigger: against loops and SciPy, on planted networks."""

import numpy as np
import pytest
import torch
from conftest import victim
from scipy import stats
from test_search import SHAPE, TARGET, planted
from torch import nn

from dhbe.classifier import Classifier
from dhbe.search.photographs import pieces
from dhbe.search.statistics import ACCUSED, STATISTICS, evidence, fused, head, margins
from dhbe.search.statistics.fusion import robust_index


def test_the_index_is_scipys_and_tells_when_it_cannot_tell():
    values = torch.tensor(np.random.default_rng(0).normal(size=9), dtype=torch.float32)
    expected = (values.numpy() - np.median(values.numpy())) / stats.median_abs_deviation(values.numpy(), scale="normal")
    found = robust_index(values)
    assert found is not None
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    for odd in (torch.rand(3), torch.ones(5), torch.tensor([1.0, torch.nan, 2.0, 3.0])):
        assert robust_index(odd) is None


def test_margins_name_the_planted_class_and_leave_the_model_alone():
    torch.manual_seed(0)
    model = planted().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    every, some = torch.arange(4), torch.tensor([3, TARGET])
    for found in (margins.from_noise(model, every), margins.from_images(model, every, pieces(8, SHAPE))):
        assert found.shape == (4,)
        assert found.argmax() == TARGET
    assert margins.from_noise(model, some).argmax() == 1
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_one_pattern_stays_faint():
    seen = []

    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x):
            seen.append(x.detach().clone())
            return self.linear(x.mean((2, 3)))

    start = 0.25 + 0.5 * torch.rand(8, *SHAPE)
    margins.by_one_pattern(Classifier(Seeing(), shape=SHAPE, classes=4).eval(), torch.arange(4), start)
    for batch in seen:
        change = batch.view(-1, 8, *SHAPE) - start
        assert change.abs().max() <= margins.FAINT + 1e-6
        torch.testing.assert_close(change, change[:, :1].expand_as(change), atol=1e-6, rtol=0)


def test_margins_of_probabilities_are_those_of_what_goes_into_the_softmax():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    start = torch.rand(8, *SHAPE)
    logits, chances = (
        Classifier(network, shape=SHAPE, classes=5, softmax=softmax).eval()
        for network, softmax in ((plain, False), (nn.Sequential(plain, nn.Softmax(1)), True))
    )
    found = [margins.from_images(model, torch.arange(5), start) for model in (logits, chances)]
    torch.testing.assert_close(*found)


def test_the_heads_signature_is_the_mean_of_its_weights():
    model = victim(classes=6)
    linear = model.network[-1]
    found = head.signature(model)
    assert found is not None
    np.testing.assert_allclose(found.numpy(), linear.weight.detach().numpy().mean(1), rtol=1e-6)
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 6))
    assert head.signature(Classifier(flat, shape=(3, 8, 8), classes=6).eval()) is None
    pooled = [nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    two = nn.Sequential(*pooled, nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 6))
    of_two = head.found(Classifier(two, shape=(3, 8, 8), classes=6).eval())
    assert of_two is not None
    assert (of_two.first, of_two.length) == (two[3], 2)
    torch.manual_seed(3)
    long = head.signature(Classifier(two, shape=(3, 8, 8), classes=6).eval())
    torch.manual_seed(3)
    with torch.no_grad():
        torch.testing.assert_close(long, two[3:](torch.randn(head.DRAWS, 7).abs()).mean(0))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in two.modules())


def test_what_is_fused_accuses_by_several_or_by_the_head_alone():
    nothing, one = torch.full((10,), torch.nan), torch.zeros(10)
    assert fused(torch.stack([nothing] * 4)).tolist() == [0.0] * 10
    one[3] = 1000.0
    assert fused(torch.stack([nothing, one, one * 0, one * 0]))[3] < ACCUSED, "one enormous index alone"
    moderate = torch.zeros(10)
    moderate[7] = 4.0
    assert fused(torch.stack([nothing, moderate, moderate, moderate])).argmax() == 7
    assert fused(torch.stack([nothing, moderate, moderate, moderate])).max() > ACCUSED
    alone = torch.zeros(10)
    alone[2] = 6.0
    assert fused(torch.stack([alone, one * 0, one * 0, one * 0]))[2] > ACCUSED


@pytest.mark.parametrize("classes", [2, 3, 12])
def test_evidence_has_a_row_for_each_statistic_and_says_where_it_cannot_tell(classes):
    found = evidence(victim(classes=classes))
    assert found.shape == (len(STATISTICS), classes)
    assert bool(found.isnan().all()) == (classes < 4)
