"""Folded networks answer as they did, and what cannot be folded stays as it is."""

import pytest
import torch
from conftest import victim
from torch import nn
from torch.nn import functional as F

from dhbe import networks
from dhbe.classifier import Classifier
from dhbe.frozen import foldable, quick

SHAPE = (3, 8, 8)


def remembering(network):
    """BatchNorm layers with statistics, weights and biases of their own."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return network


class Built(nn.Module):
    """Layers, and a forward pass of which each case below is another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False, groups=2)
        self.n, self.m, self.plain = nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6)
        self.fc, self.flat, self.last = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(F.relu(self.m(self.b(F.relu(self.n(self.a(x)))))))

    def head(self, x):
        return self.last(F.relu(self.flat(self.fc(x.mean((2, 3))))))


class PreActivated(Built):
    def forward(self, x):
        return self.head(F.relu(self.m(F.relu(self.n(self.b(self.a(x)))) + 1)))


class SharedLayer(Built):
    def forward(self, x):
        return self.head(self.n(self.b(self.plain(self.b(self.a(x))))))


class SharedNorm(Built):
    def forward(self, x):
        return self.head(self.n(self.b(self.n(self.a(x)))))


class SeenTwice(Built):
    def forward(self, x):
        between = self.a(x)
        return self.head(self.n(between) + between)


class Functional(Built):
    def forward(self, x):
        x = F.batch_norm(self.a(x), self.n.running_mean, self.n.running_var, self.n.weight, self.n.bias)
        return self.head(F.conv2d(self.m(self.b(x)), self.b.weight, padding=1, groups=2))


class Deciding(Built):
    def forward(self, x):
        x = self.a(x)
        return self.head(self.n(x) if x.mean() > 0 else x)


class UnderTwoNames(Built):
    def __init__(self):
        super().__init__()
        self.again = self.n

    def forward(self, x):
        return self.head(self.again(self.a(x)))


class Looking(Built):
    """Its code reads a number off its own BatchNorm."""

    def forward(self, x):
        return self.head(self.n(self.a(x)) * self.n.eps)


HEAD = ("fc", "flat")
CASES = {
    Built: [("a", "n"), ("b", "m"), HEAD],
    PreActivated: [("b", "n"), HEAD],
    SharedLayer: [HEAD],
    SharedNorm: [HEAD],
    SeenTwice: [HEAD],
    Functional: [HEAD],
    Deciding: [],
    UnderTwoNames: [("a", "n"), HEAD],
    Looking: [("a", "n"), HEAD],
}


def made(kind):
    torch.manual_seed(0)
    return Classifier(remembering(kind()).eval(), shape=SHAPE, classes=4, mean=(0.5,), std=(0.2,))


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_what_can_be_folded_is_and_the_answers_stay(kind):
    model = made(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert sorted(foldable(model.network)) == sorted(CASES[kind])
    swift, pixels = quick(model), torch.rand(16, *SHAPE)
    with torch.no_grad():
        assert torch.allclose(swift(pixels), model(pixels), rtol=1e-4, atol=1e-4)
    left = sum(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in swift.modules())
    assert left == 4 - (0 if kind is Looking else len(CASES[kind]))
    assert not any(parameter.requires_grad for parameter in swift.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet8", "wrn16-1"])
def test_networks_of_the_zoo_are_folded(name):
    torch.manual_seed(0)
    network = remembering(networks.build(name, 10, (3, 16, 16))).eval()
    model = Classifier(network, shape=(3, 16, 16), classes=10)
    swift, pixels = quick(model), torch.rand(4, 3, 16, 16)
    kinds = [sum(isinstance(each, nn.BatchNorm2d) for each in which.modules()) for which in (model, swift)]
    assert kinds == {"resnet8": [9, 0], "wrn16-1": [13, 7]}[name]
    with torch.no_grad():
        assert torch.allclose(swift(pixels), model(pixels), rtol=1e-4, atol=1e-4 * float(model(pixels).abs().max()))


def test_layers_whose_weights_are_computed_or_watched_stay():
    model = made(Built)
    model.network.b.register_forward_hook(lambda module, inputs, output: output + 1)
    nn.utils.parametrizations.weight_norm(model.network.fc)
    assert foldable(model.network) == [("a", "n")]
    with torch.no_grad():
        pixels = torch.rand(4, *SHAPE)
        assert torch.allclose(quick(model)(pixels), model(pixels), rtol=1e-4, atol=1e-4)


def test_answers_that_would_differ_are_not_given(monkeypatch):
    model = victim()
    doubled = lambda network, layer, norm: network.get_submodule(layer).weight.data.mul_(2)  # noqa: E731
    monkeypatch.setattr("dhbe.frozen.fold", doubled)
    swift, pixels = quick(model), torch.rand(4, *SHAPE)
    with torch.no_grad():
        assert torch.allclose(swift(pixels), model(pixels), rtol=1e-4, atol=1e-4)


def test_the_random_state_is_left_alone():
    model = victim()
    before = torch.get_rng_state()
    quick(model)
    assert torch.equal(torch.get_rng_state(), before)
