"""The generators against plain layers: nearest-neighbour upsampling, then convolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dhbe.generators import NOISE, Doubling, ImageGenerator, PixelGenerator, TriggerGenerator, start

sides = st.integers(1, 80)


@pytest.fixture
def double():
    """Everything in float64, so that tolerances can be tight."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("into", "out", "height", "width"), [(1, 1, 1, 1), (3, 5, 4, 7), (8, 4, 5, 2)])
def test_doubling_is_upsampling_then_convolution(double, into, out, height, width):
    ours = Doubling(into, out)
    plain = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(into, out, 3, padding=1))
    plain[1].load_state_dict(ours.state_dict())
    images = torch.randn(2, into, height, width)
    a, b = images.clone().requires_grad_(), images.clone().requires_grad_()
    result, expected = ours(a), plain(b)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)  # of a loss that treats every output differently
    (weights * result.square()).sum().backward()
    (weights * expected.square()).sum().backward()
    for mine, other in ((a, b), (ours.weight, plain[1].weight), (ours.bias, plain[1].bias)):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)


@settings(deadline=None)
@given(sides, st.sampled_from([8, 9]))
def test_start_is_the_least_number_of_doublings(side, largest):
    first, doublings = start(side, largest)
    assert 1 <= first <= largest
    assert side <= first * 2**doublings < side + 2**doublings
    assert doublings == 0 or side > largest * 2 ** (doublings - 1)


@settings(deadline=None, max_examples=15)
@given(st.integers(8, 72), st.sampled_from([1, 3]))
def test_images_have_the_asked_shape_and_are_standardised(side, channels):
    torch.manual_seed(0)
    generator = ImageGenerator(side, channels)
    assert generator.first in (5, 6, 7, 8)
    images = generator(torch.randn(6, NOISE)).detach()
    assert images.shape == (6, channels, side, side)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(channels), rtol=0, atol=1e-4)
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(channels), rtol=0, atol=0.01)


@settings(deadline=None, max_examples=15)
@given(sides, st.sampled_from([1, 3]))
def test_triggers_have_the_asked_shape_and_lie_between_minus_one_and_one(side, channels):
    torch.manual_seed(0)
    patches = TriggerGenerator(side, channels)(torch.randn(6, NOISE)).detach()
    assert patches.shape == (6, channels, side, side)
    assert patches.abs().max() < 1
    assert patches.std() > 0.3  # they fill the range


@pytest.mark.parametrize("side", [8, 28, 32])
def test_pixels_lie_between_zero_and_one(side):
    torch.manual_seed(0)
    generator = PixelGenerator(side, 3)
    pixels = generator(torch.randn(6, NOISE))
    assert pixels.shape == (6, 3, side, side)
    assert 0 < pixels.min() < 0.2
    assert 0.8 < pixels.max() < 1
    standardised = ImageGenerator(side, 3)
    standardised.load_state_dict(generator.state_dict(), strict=False)
    noise = torch.randn(6, NOISE)
    expected = 1 / (1 + torch.exp(-1.1 * standardised(noise)))
    torch.testing.assert_close(generator(noise), expected, rtol=1e-4, atol=1e-5)
    pixels.mean().backward()
    assert generator.contrast.grad is not None
    assert generator.brightness.grad.abs().min() > 0


def test_sizes_are_those_of_the_paper():
    def count(network):
        return sum(parameter.numel() for parameter in network.parameters())

    assert count(ImageGenerator(32, 3)) == 2_329_091
    # table 10: linear, BatchNorm, convolution
    assert count(TriggerGenerator(5, 3)) == 257 * 64 * 25 + 2 * 64 + (64 * 9 + 1) * 3
    assert len(ImageGenerator(32, 3).blocks) == 2
    assert len(ImageGenerator(64, 3).blocks) == 3


@pytest.mark.parametrize("side", [16, 32])
def test_image_generator_is_the_plain_stack_of_layers(double, side):
    generator, noise = ImageGenerator(side, 3), torch.randn(4, NOISE)
    *_, out = layers = list(generator.children())
    assert isinstance(out, nn.BatchNorm2d)
    project, norm, blocks, to_image, _ = layers

    def batch_norm(x, weight=None, bias=None):
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        x = (x - mean) / (variance + 1e-5).sqrt()
        return x if weight is None else x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)

    x = batch_norm((noise @ project.weight.T + project.bias).reshape(4, 128, 8, 8), norm.weight, norm.bias)
    for conv, bn, _ in blocks:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = batch_norm(F.conv2d(x, conv.weight, conv.bias, padding=1), bn.weight, bn.bias)
        x = torch.where(x > 0, x, 0.2 * x)
    expected = batch_norm(F.conv2d(x, to_image.weight, to_image.bias, padding=1).tanh())
    torch.testing.assert_close(generator(noise), expected, rtol=1e-9, atol=1e-9)
