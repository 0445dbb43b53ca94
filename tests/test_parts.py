"""Losses, patches and steps, against loops and numbers from the formulas."""

import math

import numpy as np
import pytest
import torch
from conftest import victim
from scipy import stats
from torch import nn

from dhbe.search.batchnorm import BatchStatistics, imbalance
from dhbe.steps import descend, frozen, gap, lay, set_lr, variation

# ---- losses


def derivative(function, x: np.ndarray, step=1e-6) -> np.ndarray:
    """By central differences."""
    result = np.empty_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        result[index] = (function(up) - function(down)) / (2 * step)
    return result


def agrees(ours, plain, x: np.ndarray, dtype=torch.float64, **tolerance) -> None:
    """Value and gradient of a loss in torch are those of one in NumPy."""
    leaf = torch.tensor(x, dtype=dtype, requires_grad=True)
    value = ours(leaf)
    value.backward()
    np.testing.assert_allclose(value.item(), plain(x), **tolerance)
    np.testing.assert_allclose(leaf.grad.numpy(), derivative(plain, x), **tolerance)


def test_gap_is_the_mean_absolute_difference_over_batch_and_classes():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 3))

    def plain(logits):
        return sum(abs(logits[i, j] - b[i, j]) for i in range(5) for j in range(3)) / 15

    agrees(lambda logits: gap(logits, torch.tensor(b)), plain, a, rtol=1e-6, atol=1e-8)
    agrees(lambda logits: gap(torch.tensor(b), logits), plain, a, rtol=1e-6, atol=1e-8)


def test_variation_sums_the_norms_of_the_batch_in_four_directions():
    images = np.random.default_rng(1).normal(size=(2, 2, 4, 5))

    def plain(x):
        total = 0.0
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
            squares = 0.0
            for row in range(4 - down):
                for column in range(max(0, -right), 5 - max(0, right)):
                    squares += ((x[:, :, row + down, column + right] - x[:, :, row, column]) ** 2).sum()
            total += math.sqrt(squares)
        return total

    agrees(variation, plain, images, rtol=1e-6, atol=1e-8)


def test_variation_of_flat_images_has_a_finite_gradient():
    flat = torch.ones(2, 3, 8, 8, requires_grad=True)
    variation(flat).backward()
    assert torch.equal(flat.grad, torch.zeros_like(flat))


def test_batch_statistics_are_those_of_the_formula():
    rng = np.random.default_rng(2)
    x = rng.normal(0.5, 2, size=(3, 2, 3, 3))
    remembered = [(rng.normal(size=2), rng.uniform(0.5, 2, size=2)) for _ in range(2)]
    weight, bias = rng.uniform(0.5, 1.5, size=2), rng.normal(size=2)
    teacher = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)).eval().requires_grad_(False)
    for layer, (mean, variance) in zip(teacher, remembered, strict=True):
        layer.running_mean.copy_(torch.tensor(mean))
        layer.running_var.copy_(torch.tensor(variance))
    teacher[0].weight.copy_(torch.tensor(weight))
    teacher[0].bias.copy_(torch.tensor(bias))

    def plain(x):
        total = 0.0
        for mean, variance in remembered:
            for channel in range(2):
                values, deviation = x[:, channel], math.sqrt(variance[channel] + 1e-5)
                total += ((values.mean() - mean[channel]) / deviation) ** 2 / 2
                total += (math.sqrt(values.var() + 1e-5) / deviation - 1) ** 2 / 2
            each = [a.reshape(2, 1, 1) for a in (*remembered[0], weight, bias)]
            x = (x - each[0]) / np.sqrt(each[1] + 1e-5) * each[2] + each[3]
        return total / 2

    def ours(x):
        with BatchStatistics(teacher) as statistics:
            teacher(x * 7)  # outside of gathering: not measured
            with statistics.gathering():
                teacher(x)
            teacher(x * 9)
            return statistics.distance()

    agrees(ours, plain, x, dtype=torch.float32, rtol=1e-4, atol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in teacher)


def test_batch_statistics_of_a_teacher_without_batchnorm_are_zero():
    teacher = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    with BatchStatistics(teacher) as statistics:
        with statistics.gathering():
            teacher(torch.rand(2, 3, 4, 4))
        assert statistics.distance() == 0


def test_imbalance_is_minus_the_entropy_of_the_mean_prediction():
    logits = np.random.default_rng(3).normal(size=(6, 4))

    def plain(x):
        odds = np.exp(x)
        share = (odds / odds.sum(1, keepdims=True)).mean(0)
        return (share * np.log(share)).sum()

    agrees(imbalance, plain, logits, rtol=1e-6, atol=1e-8)
    even = torch.eye(4) * 1e4
    assert imbalance(even).item() == pytest.approx(-math.log(4))
    one = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
    imbalance(one).backward()
    assert one.grad.isfinite().all()


# ---- patches


def places_of(laid: torch.Tensor, patches: torch.Tensor) -> list[tuple[int, int]]:
    """Where each patch lies; fails unless it is there once, whole, and all else is 0."""
    found = []
    side = patches.shape[-1]
    for image, patch in zip(laid, patches, strict=True):
        rows, columns = (image.abs().sum(axes) for axes in ((0, 2), (0, 1)))
        top, left = int(rows.nonzero()[0]), int(columns.nonzero()[0])
        expected = torch.zeros_like(image)
        expected[:, top : top + side, left : left + side] = patch
        assert torch.equal(image, expected)
        found.append((top, left))
    return found


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("side", "height", "width"), [(1, 8, 8), (3, 8, 8), (5, 9, 12), (8, 8, 8)])
def test_lay_sets_each_patch_once_and_whole(each, side, height, width):
    torch.manual_seed(0)
    for _ in range(10):
        patches = torch.rand(12, 3, side, side) + 0.1
        places = places_of(lay(patches, height, width, each=each), patches)
        assert each or len(set(places)) == 1
    if each and side < 8:
        assert len(set(places)) > 3


@pytest.mark.parametrize("each", [False, True])
def test_lay_reaches_every_place_equally_often(each):
    torch.manual_seed(1)
    height, width, side = 7, 6, 3
    size, calls = (3600, 1) if each else (1, 2000)
    places = []
    for _ in range(calls):
        patches = torch.ones(size, 1, side, side)
        places += places_of(lay(patches, height, width, each=each), patches)
    seen, counts = np.unique(np.array(places), axis=0, return_counts=True)
    assert len(seen) == (height - side + 1) * (width - side + 1)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_lay_hands_each_patch_its_own_gradient():
    patches = torch.rand(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    laid = lay(patches, 8, 8, each=True)
    weights = torch.rand_like(laid)
    (laid * weights).sum().backward()
    for patch, weight, (top, left) in zip(patches.grad, weights, places_of(laid.detach(), patches), strict=True):
        torch.testing.assert_close(patch, weight[:, top : top + 3, left : left + 3])


# ---- steps


def test_frozen_weights_come_back_as_they_were():
    model = victim()
    first = next(model.parameters()).requires_grad_(False)

    def fail():
        with frozen(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not first.requires_grad
    assert sum(not parameter.requires_grad for parameter in model.parameters()) == 1


def test_learning_rates_are_shares_of_what_they_began_with():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for share in (1.0, 0.1, 0.1, 0.01):
        set_lr([optimizer], share)
        before = weight.item()
        descend(optimizer, 2 * weight.sum())
        assert before - weight.item() == pytest.approx(0.5 * share * 2, rel=1e-4)
