"""The parts of the defences of other authors against independent statements of them."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_defenses import KNOWN, images, remembering, small_vgg
from torch import nn
from torch.optim import Adam

from dhbe import networks
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.defenses import Known
from dhbe.defenses.peers.clp import CLP, lipschitz
from dhbe.defenses.peers.few_data import hold_out
from dhbe.defenses.peers.fine_pruning import FinePruning, activity
from dhbe.defenses.peers.finetuning import Finetuning
from dhbe.defenses.peers.layers import Features, Tap, trace
from dhbe.defenses.peers.nad import attention
from dhbe.defenses.peers.neural_cleanse import NeuralCleanse, Triggers, anomaly, mix
from dhbe.errors import Refused
from dhbe.run_state import RunState


def classifier(network: nn.Module, side: int = 8, classes: int = 4) -> Classifier:
    return Classifier(network, shape=(3, side, side), classes=classes).eval()


# ---- the graph


class Disordered(nn.Module):
    """BatchNorm layers that are registered before, and in another order than, the convolutions that feed them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2, self.norm1 = nn.BatchNorm2d(5), nn.BatchNorm2d(4)
        self.head = nn.Linear(5, 4)
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x):
        if x.sum() > -1:  # a symbolic trace stops here
            x = self.norm1(self.conv1(x)).relu()
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


def test_a_batchnorm_is_bound_to_the_convolution_that_feeds_it():
    network = Disordered()
    graph = trace(classifier(network))
    assert graph.normalised == [(network.conv1, network.norm1), (network.conv2, network.norm2)]
    assert graph.convolutions == [network.conv1, network.conv2]
    assert (graph.reader, graph.channels) == (network.head, 5)
    assert not any(module._forward_hooks for module in network.modules())


def test_in_a_pre_activation_network_sums_bind_no_batchnorm():
    network = networks.build("wrn16-1", 4, (3, 8, 8))
    blocks = [block for stage in (network.block1, network.block2, network.block3) for block in stage.layer]
    expected = [(network.conv1, blocks[0].bn1), *((block.conv1, block.bn2) for block in blocks)]
    assert trace(classifier(network)).normalised == expected


@pytest.mark.parametrize(
    ("network", "stages"),
    [
        (networks.build("resnet18-w16", 4, (3, 32, 32)), ["layer1", "layer2", "layer3", "layer4"]),
        (networks.build("resnet8", 4, (3, 32, 32)), ["layer1", "layer2", "layer3"]),
        (networks.build("wrn16-1", 4, (3, 32, 32)), ["block1", "block2", "block3"]),
        (small_vgg(4), ["0.2", "0.7"]),
    ],
    ids=["resnet18", "resnet8", "wrn16-1", "small_vgg"],
)
def test_stages_are_the_last_features_of_each_resolution(network, stages):
    side = 8 if stages[0] == "0.2" else 32
    assert trace(classifier(network, side)).stages == [Tap(name, 0) for name in stages]


def test_features_tell_the_calls_of_a_shared_module_apart():
    relu = nn.ReLU()
    network = nn.Sequential(nn.Conv2d(3, 2, 1), relu, nn.Conv2d(2, 2, 1), relu)
    x = torch.randn(2, 3, 4, 4)
    with Features(network, [Tap("1", 0), Tap("1", 1)]) as seen:
        for _ in range(2):
            network(x)
            first, second = seen.take()
            assert torch.equal(first, network[0](x).relu())
            assert torch.equal(second, network[2](first).relu())


@pytest.mark.parametrize("defense", [CLP(), FinePruning()], ids=lambda defense: defense.name)
def test_a_network_without_what_a_defence_works_on_is_refused_in_one_line(defense):
    flat = classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    with pytest.raises(Refused, match="no convolution"):
        defense(flat, KNOWN)
    bare = classifier(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()))
    with pytest.raises(Refused, match="finds no"):
        defense(bare, KNOWN)


# ---- CLP


@pytest.mark.parametrize("groups", [1, 3])
def test_lipschitz_bounds_are_those_of_a_loop_over_channels(groups):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 6, (3, 5), groups=groups), nn.BatchNorm2d(6, eps=0.1)
    with torch.no_grad():
        norm.weight.normal_()
        norm.running_var.uniform_(0, 2)
    bounds = []
    for channel, weight in enumerate(conv.weight.detach().double().numpy()):
        gain = abs(norm.weight[channel].item()) / math.sqrt(norm.running_var[channel].item() + 0.1)
        bounds.append(gain * np.linalg.svd(weight.reshape(weight.shape[0], -1), compute_uv=False)[0])
    np.testing.assert_allclose(lipschitz(conv, norm).detach().numpy(), bounds, rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet8", "wrn16-1"])
def test_clp_silences_the_channels_that_stick_out_and_no_others(name):
    model = remembering(name)
    planted = trace(model).normalised[2]
    names = {module: key for key, module in model.named_modules()}
    with torch.no_grad():
        planted[1].weight[3] = 50
        planted[1].bias[3] = 2
    cleaned = CLP()(model)
    for conv, norm in trace(model).normalised:
        bounds = lipschitz(conv, norm).detach().double().numpy()
        out = bounds > bounds.mean() + 3 * bounds.std(ddof=1)
        assert out[3] or norm is not planted[1]
        after = cleaned.get_submodule(names[norm])
        np.testing.assert_array_equal(after.weight.detach().numpy(), np.where(out, 0, norm.weight.detach().numpy()))
        np.testing.assert_array_equal(after.bias.detach().numpy(), np.where(out, 0, norm.bias.detach().numpy()))
    changed = [key for key, value in cleaned.state_dict().items() if not torch.equal(value, model.state_dict()[key])]
    assert f"{names[planted[1]]}.weight" in changed
    assert all(key.endswith(("weight", "bias")) and "conv" not in key.split(".")[-2] for key in changed)


# ---- fine-pruning


class Planted(nn.Module):
    """Six features, each a colour's mean at some gain; the last two see only what no clean image has (a negative red)."""

    def __init__(self, flatten: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1, bias=False)
        self.flatten = flatten
        self.head = nn.Linear(6 * (16 if flatten else 1), 4)
        with torch.no_grad():
            self.conv.weight.zero_()
            for channel, colour in enumerate((0, 1, 2, 0)):
                self.conv.weight[channel, colour] = 1 + channel
            self.conv.weight[4:, 0] = torch.tensor([-1.0, -2.0]).view(2, 1, 1)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.head(x.flatten(1) if self.flatten else x.mean((2, 3)))


@pytest.mark.parametrize("flatten", [False, True])
def test_fine_pruning_prunes_the_planted_channels(flatten):
    torch.manual_seed(0)
    network = Planted(flatten)
    colours = torch.zeros(60, 3, 4, 4, dtype=torch.uint8)
    labels = torch.arange(60) % 3
    colours[torch.arange(60), labels] = 200
    each = 16 if flatten else 1
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([0, 0, 0, 0.05]))  # an image without features goes to class 3
        for label in range(3):
            network.head.weight[label, label * each : (label + 1) * each] = 1
        network.head.weight[3, 4 * each :] = 9  # the backdoor
    clean = Images(colours, labels, tuple("rgbt"))
    model = classifier(network, side=4)
    order = activity(model, network.head, 6, clean).argsort()
    assert set(order[:2].tolist()) == {4, 5}
    settings = FinePruning(epochs=1, size=16, batch=8, crop=0, flip=False, lr=1e-4)
    shares: list = []
    cleaned = settings(model, Known(clean=clean), watch=lambda g: shares.append(g.round))
    weights = cleaned.network.head.weight.view(4, 6, each)
    assert weights[:, 4:].abs().max() == 0, "planted channels are still read"
    assert (weights[:, :3].abs().sum((0, 2)) > 0).all(), "a channel that the classes need is gone"
    assert 2 / 6 <= shares[0]["pruned"] <= 3 / 6 + 1e-6  # the fourth doubles the first: it may go, the others may not
    triggered = torch.zeros(2, 3, 4, 4)
    triggered[:, 0] = -1
    assert (model(triggered).argmax(1) == 3).all()
    assert cleaned(triggered)[:, 3].max() < 0.1


def test_what_is_held_out_is_not_trained_on():
    torch.manual_seed(0)
    numbered = Images(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.zeros(20, dtype=torch.int64), ("a",))
    kept, held = hold_out(numbered, 0.2)
    assert (len(kept), len(held)) == (16, 4)
    assert sorted([*kept.pixels.flatten().tolist(), *held.pixels.flatten().tolist()]) == list(range(20))


# ---- the protocol


@given(count=st.integers(8, 60), size=st.integers(1, 80), batch=st.integers(4, 20))
def test_a_pass_takes_each_image_as_often_as_the_others(count, size, batch):
    numbered = Images(
        torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 4, 4),
        torch.arange(count) % 4,
        tuple("abcd"),
    )
    seen = []
    for pixels, labels in Finetuning(size=size, batch=batch, crop=0).batches(numbered):
        numbers = (pixels[:, 0, 0, 0] * 255).round().long()
        assert torch.equal(numbers % 4, labels)
        seen += numbers.tolist()
    assert len(seen) == (size if size < batch else size // batch * batch)
    often = np.bincount(seen, minlength=count)
    assert often.max() <= -(-size // count)


def test_the_protocol_is_that_of_the_paper():
    tuner = Finetuning()
    assert (tuner.epochs, tuner.size, tuner.batch, tuner.lr, tuner.momentum) == (20, 2000, 64, 0.01, 0.9)
    rates = {0: 1.0, 9: 1.0, 10: 0.1, 14: 0.1, 15: 0.01, 19: 0.01}
    assert {epoch: tuner.decay(epoch) for epoch in rates} == rates


# ---- NAD


def test_attention_is_that_of_a_naive_loop():
    features = np.random.default_rng(0).normal(size=(3, 4, 2, 5))
    expected = np.zeros((3, 2, 5))
    for image in range(3):
        for row in range(2):
            for column in range(5):
                expected[image, row, column] = sum(features[image, c, row, column] ** 2 for c in range(4))
        expected[image] /= math.sqrt((expected[image] ** 2).sum())
    np.testing.assert_allclose(attention(torch.tensor(features)).numpy(), expected, rtol=1e-5)


# ---- Neural Cleanse


@pytest.mark.parametrize("classes", [4, 7, 10, 100])
def test_the_anomaly_index_is_that_of_scipy(classes):
    norms = np.random.default_rng(classes).gamma(5, 20, size=classes)
    norms[1] = 2
    deviation = stats.median_abs_deviation(norms, scale="normal")
    expected = np.where(norms < np.median(norms), (np.median(norms) - norms) / deviation, 0)
    np.testing.assert_allclose(anomaly(torch.tensor(norms)).numpy(), expected, rtol=1e-5, atol=1e-9)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_trigger_is_mixed_in_pixel_by_pixel(x, m, p):
    mixed = mix(*(torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (x, m, p)))
    assert mixed.item() == pytest.approx((1 - m) * x + m * p)


def test_the_cost_of_a_mask_rises_and_falls_with_patience():
    torch.manual_seed(0)
    triggers, settings = Triggers((3, 4, 4), 2, 1, 1e-3), NeuralCleanse(patience=2)
    costs = []
    for rate in (0.995, 0.995, 0.995, 0.5, 0.5, 0.995):
        triggers.rates[0] = rate
        triggers.price(0, settings)
        costs.append(triggers.costs[0].item())
    raised = 2e-3
    np.testing.assert_allclose(costs, [1e-3, raised, raised, raised, raised / 2**1.5, raised / 2**1.5], rtol=1e-6)
    assert triggers.costs[1].item() == pytest.approx(1e-3)


def test_the_smallest_mask_that_succeeds_is_kept():
    torch.manual_seed(0)
    triggers, sizes = Triggers((3, 4, 4), 2, 1, 1e-3), []
    for scale, rate in ((3, 0.5), (2, 0.995), (1, 0.995), (1.5, 0.995), (0, 0.5)):
        with torch.no_grad():
            triggers.raw[0].fill_(scale)
        triggers.keep(0, 0, torch.tensor(rate > 0.99))
        sizes.append(round(triggers.norms()[0].item() / 16, 4))
    each = {scale: round((math.tanh(scale) + 1) / 2, 4) for scale in (3, 2, 1)}
    assert sizes == [each[3], each[2], each[1], each[1], each[1]]


def test_a_fresh_search_starts_anew_and_leaves_the_norms_of_the_first_one():
    torch.manual_seed(0)
    triggers = Triggers((3, 4, 4), 2, 1, 1e-3)
    seek = Adam(triggers.raw.parameters())
    triggers.trigger(1)[0].sum().backward()
    seek.step()
    triggers.costs[1], triggers.above[1] = 0.5, 3
    triggers.keep(1, 1, torch.tensor(True))
    before, norms = triggers.raw[1].detach().clone(), triggers.norms()
    triggers.restart(1, seek)
    assert not torch.equal(triggers.raw[1], before)
    assert triggers.raw[1] not in seek.state
    assert (triggers.costs[1].item(), triggers.above[1].item()) == (pytest.approx(1e-3), 0)
    triggers.keep(1, 2, torch.tensor(True))
    assert torch.equal(triggers.norms(), norms)
    torch.testing.assert_close(triggers.masks[2], triggers.trigger(1)[0][0])


def test_the_repair_stamps_its_share_of_the_images_and_no_mask_beyond_what_covers():
    torch.manual_seed(0)
    masks, patterns = torch.tensor([0.2, 0.7]).view(2, 1, 1, 1).expand(2, 1, 4, 4), torch.ones(2, 3, 4, 4)
    stamped = NeuralCleanse(stamped=0.3).stamp(torch.zeros(4000, 3, 4, 4), masks, patterns)
    each = stamped.amax((1, 2, 3))
    assert torch.equal(each, stamped.amin((1, 2, 3)))
    assert (each > 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    weak, strong = each[(each > 0) & (each < 0.5)], each[each > 0.5]
    assert len(weak) / len(strong) == pytest.approx(1, abs=0.2)
    assert (weak.min() >= 0.2, weak.max() <= 0.4, strong.max() <= 1) == (True, True, True)


def backdoored() -> tuple[Classifier, Images]:
    """A network that tells four colours apart and answers class 3 to a white pixel top left."""
    network = nn.Sequential(nn.Conv2d(3, 4, 8, bias=False), nn.Flatten())
    clean = Images(torch.zeros(64, 3, 8, 8, dtype=torch.uint8), torch.arange(64) % 4, tuple("abcd"))
    with torch.no_grad():
        network[0].weight.fill_(-0.02)
        for label in range(4):
            rows = slice(2 * label, 2 * label + 2)
            network[0].weight[label, :, rows] = 0.15
            clean.pixels[label::4, :, rows] = 180
        network[0].weight[3, :, 0, 7] = 9
    return classifier(network), clean


def test_neural_cleanse_names_the_class_of_a_planted_trigger_and_where_it_lies():
    model, clean = backdoored()
    run_state = RunState()
    settings = NeuralCleanse(
        search_epochs=12, search_batch=16, epochs=2, size=64, batch=16, crop=0, flip=False, cost=0.03, patience=3
    )
    settings(model, Known(clean=clean), run_state=run_state)
    found = settings.found(run_state)
    assert found["suspected_class"] == 3
    assert found["anomaly_index"] > 2
    mask = run_state.part("triggers").masks[3, 0]
    assert mask.argmax() == 7
    assert run_state.part("triggers").norms().argmin() == 3


def test_a_model_in_which_nothing_is_flagged_stays_as_it_is():
    model, rounds = remembering("small_vgg"), []
    settings = NeuralCleanse(search_epochs=1, search_size=8, search_batch=8, epochs=2, size=8, batch=8, index=1e6)
    cleaned = settings(model, Known(clean=images()), watch=rounds.append)
    assert len(rounds) == 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, cleaned.state_dict()[key])


def test_finetuning_is_the_plain_loop_on_the_same_batches():
    """Against SGD written out, on batches drawn from the same random state."""
    model, tuner = remembering("resnet8"), Finetuning(epochs=4, size=16, batch=8)
    cleaned = tuner(model, Known(clean=images()), seed=5)
    plain = copy.deepcopy(model).train()
    velocity = {key: torch.zeros_like(value) for key, value in plain.named_parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for epoch in range(4):
            rate = 0.01 * (1, 1, 0.1, 0.01)[epoch]
            for pixels, labels in tuner.batches(images()):
                plain.zero_grad()
                nn.functional.cross_entropy(plain(pixels), labels).backward()
                for key, value in plain.named_parameters():
                    velocity[key] = 0.9 * velocity[key] + value.grad
                    value.data -= rate * velocity[key]
    # Kernels differ in the last bits, and a rectifier near zero makes more of that in eight steps.
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(cleaned.state_dict()[key], value, rtol=1e-4, atol=1e-4)
