import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.cbook import boxplot_stats
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import wasserstein_distance

from dhbe import networks
from dhbe.attacks.triggers import parse
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.errors import Refused
from dhbe.evaluation.diagnostics import (
    activation_differences,
    box,
    directions,
    shadows,
    trigger_distance,
    wasserstein,
)
from dhbe.evaluation.metrics import bootstrap

SHAPE = (3, 16, 16)
PIXELS = torch.randint(256, (64, *SHAPE), generator=torch.Generator().manual_seed(0)) / 255


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_distances_along_a_line_are_scipys(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(count, 5, generator=generator, dtype=torch.float64) for count in (n, m))
    lines = directions(4, 5, generator).double()
    assert torch.allclose(lines.norm(dim=1), torch.ones(4, dtype=torch.float64))
    found = wasserstein(shadows(one, lines), shadows(other, lines))
    for line, distance in zip(lines, found, strict=True):
        expected = wasserstein_distance((one @ line).numpy(), (other @ line).numpy())
        assert distance.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("side", [1, 3, 5, 16])
def test_a_square_moves_images_no_more_than_table_1_says(side):
    assert trigger_distance(parse(f"badnets:{side}", SHAPE), PIXELS) <= 3 * side * side
    white = trigger_distance(parse(f"badnets:{side}:white", SHAPE), torch.zeros_like(PIXELS))
    assert white == pytest.approx(3 * side * side)


def test_full_image_triggers_move_images_as_table_1_says():
    size, grey = math.prod(SHAPE), torch.full((2, *SHAPE), 0.5)
    other = parse("blend:0.2:seed=3", SHAPE)
    expected = 0.2 * (other.pattern - PIXELS).abs().mean().item() * size
    assert trigger_distance(other, PIXELS) == pytest.approx(expected, rel=1e-4)
    # Samples of |sin| over whole cycles average a little less than the integral, 2 / pi, says.
    assert trigger_distance(parse("sig:20:3", SHAPE), grey) == pytest.approx(20 / 255 * 2 / math.pi * size, rel=0.05)
    one_bit = trigger_distance(parse("lsb:1", SHAPE), PIXELS)  # half of the bits are right already
    assert one_bit == pytest.approx(0.5 / 255 * size, rel=0.05)


def test_activation_differences_are_norms_of_what_moved():
    torch.manual_seed(0)
    network = networks.build("resnet8", 4, SHAPE)
    classifier = Classifier(network, shape=SHAPE, classes=4, mean=(0.5,), std=(0.25,)).train()
    images = Images((PIXELS * 255).round().byte(), torch.arange(64) % 4, tuple("abcd"))
    trigger = parse("badnets:5", SHAPE)
    found = activation_differences(classifier, images, trigger, batch=10)
    assert classifier.training
    classifier.eval()
    with torch.no_grad():
        clean, moved = (network.features(classifier.normalise(x)).double().numpy() for x in (PIXELS, trigger(PIXELS)))
        logits = [classifier(x).double().numpy() for x in (PIXELS, trigger(PIXELS))]
    assert set(found) == {"features_l1", "features_l2", "logits_l1", "logits_l2"}
    for name, (here, there) in {"features": (clean, moved), "logits": logits}.items():
        for order in (1, 2):
            expected = np.linalg.norm(there - here, ord=order, axis=1)
            assert np.allclose(found[f"{name}_l{order}"].numpy(), expected, rtol=1e-3, atol=1e-5)
    nothing = activation_differences(classifier, images, lambda pixels: pixels)
    assert all(values.abs().max() == 0 for values in nothing.values())
    with pytest.raises(Refused, match="need images"):
        activation_differences(classifier, images.subset(slice(0)), trigger)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_boxes_are_those_of_matplotlib(values):
    (stats,) = boxplot_stats(values)
    low, *quartiles, high = box(torch.tensor(values, dtype=torch.float64))
    assert quartiles == pytest.approx((stats["q1"], stats["med"], stats["q3"]), abs=1e-9)
    reach = 1.5 * (quartiles[2] - quartiles[0])
    inside = [x for x in values if quartiles[0] - reach <= x <= quartiles[2] + reach]
    assert (low, high) == (min(inside), max(inside))


def test_bootstrap_agrees_with_scipy():
    values = [0.91, 0.93, 0.95, 0.90, 0.97, 0.99, 0.92]
    expected = scipy_bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    assert bootstrap(values) == pytest.approx((expected.low, expected.high), abs=3e-3)
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap([0.5, 0.5]) == (0.5, 0.5)
    for bad in ([], [0.5], [0.5, math.nan]):
        with pytest.raises(Refused, match="at least two finite values"):
            bootstrap(bad)
