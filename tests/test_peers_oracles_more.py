"""The parts of MCR, GDM and of the data-free defences of other authors against independent statements of them."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from test_defenses import KNOWN, images, remembering, same
from torch import nn

from dhbe.defenses import Known
from dhbe.defenses.peers.abd import ABD, divergence, shuffled
from dhbe.defenses.peers.dfad import DFAD
from dhbe.defenses.peers.gdm import GDM, Statistics, mutual_information, overlay
from dhbe.defenses.peers.inversion import DeepInversion, invert, start
from dhbe.defenses.peers.mcr import MCR, Curve, estimate_statistics, place
from dhbe.defenses.peers.otbr import OTBR, fuse, transport
from dhbe.errors import Refused
from dhbe.generators import NOISE, ImageGenerator
from dhbe.run_state import RunState
from dhbe.search.batchnorm import BatchStatistics

# ---- MCR


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("network", ["small_vgg", "resnet8"])
def test_the_ends_of_the_curve_are_the_model_with_its_batchnorm(t, network):
    model = remembering(network)
    cleaned = MCR(epochs=2, size=16, batch=8, t=t)(model, KNOWN)
    assert same(cleaned, model)
    assert not same(MCR(epochs=2, size=16, batch=8)(model, KNOWN), model)


@given(st.floats(0, 1))
def test_weights_lie_on_a_bezier_curve(t):
    model = remembering("small_vgg")
    curve = Curve(model)
    with torch.no_grad():
        for bend in curve.bend:
            bend.normal_()
    weights = curve.weights(torch.tensor(t, dtype=torch.float64))
    assert weights.keys() == dict(model.named_parameters()).keys()
    for (name, end), bend in zip(model.named_parameters(), curve.bend, strict=True):
        a, b = end.detach().double().numpy(), bend.detach().double().numpy()
        expected = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * a
        np.testing.assert_allclose(weights[name].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_statistics_are_estimated_as_an_average_over_batches_and_dropout_is_off():
    model, clean = remembering("small_vgg"), images(24)
    first = model.network[0][1]
    estimate_statistics(model, clean, batch=8)
    with torch.no_grad():
        seen = [model.network[0][0](model.normalise(pixels)) for pixels, _ in clean.batches(8)]
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(first.running_mean, mean)
    torch.testing.assert_close(first.running_var, variance)
    assert first.momentum == 0.1
    again = copy.deepcopy(model)
    estimate_statistics(again, clean, batch=8)
    assert same(model, again), "something random, such as dropout, took part"


def test_only_the_bend_learns():
    model, run_state = remembering("resnet8"), RunState()
    MCR(epochs=1, size=16, batch=8)(model, KNOWN, run_state=run_state)
    curve = run_state.part("curve")
    assert len(list(curve.parameters())) == len(list(model.parameters()))
    for end, bend, own in zip(curve._ends, curve.bend, model.parameters(), strict=True):
        assert torch.equal(end, own)
        assert not torch.equal(bend, own)
    place(model, curve.weights(torch.tensor(0.5)))
    middle = next(iter(model.parameters()))
    torch.testing.assert_close(middle, 0.5 * curve._ends[0] + 0.5 * curve.bend[0])


# ---- GDM


class LogRatio(nn.Module):
    """The best T for a pair of standard normal numbers with a given correlation."""

    def __init__(self, rho: float) -> None:
        super().__init__()
        self.rho = rho

    def forward(self, x, z):
        rho, x, z = self.rho, x[:, 0], z[:, 0]
        quadratic = (x**2 - 2 * rho * x * z + z**2) / (1 - rho**2)
        return -0.5 * math.log(1 - rho**2) - quadratic / 2 + (x**2 + z**2) / 2


def gaussians(rho: float, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, own, apart = (torch.randn(count, 1) for _ in range(3))
    return x, rho * x + math.sqrt(1 - rho**2) * own, apart


@pytest.mark.parametrize("rho", [0.0, 0.5, -0.8])
def test_mutual_information_of_two_gaussians_with_the_best_statistics(rho):
    torch.manual_seed(0)
    known = -0.5 * math.log(1 - rho**2)
    assert mutual_information(LogRatio(rho), *gaussians(rho, 200_000)).item() == pytest.approx(known, abs=0.02)


def test_mutual_information_is_learned_from_samples_and_never_above():
    torch.manual_seed(0)
    known = -0.5 * math.log(1 - 0.8**2)
    network = Statistics(1, 1, 32)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (-mutual_information(network, *gaussians(0.8, 512))).backward()
        optimizer.step()
    with torch.no_grad():
        learned = mutual_information(network, *gaussians(0.8, 50_000)).item()
    assert 0.75 * known < learned < 1.05 * known


def test_a_patch_replaces_what_it_covers_and_nothing_else():
    torch.manual_seed(0)
    pixels, patches = torch.rand(40, 3, 8, 8), torch.rand(40, 3, 3, 3)
    places = set()
    for before, after, patch in zip(pixels, overlay(pixels, patches), patches, strict=True):
        rows, columns = (after != before).any(0).nonzero().T
        top, left = int(rows.min()), int(columns.min())
        expected = before.clone()
        expected[:, top : top + 3, left : left + 3] = patch
        assert torch.equal(after, expected)
        places.add((top, left))
    assert len(places) > 10


def test_gdm_finds_triggers_that_lead_to_the_class():
    """A network in which any bright 3 x 3 spot leads to class 2."""

    class Spotted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 3, bias=False)
            nn.init.constant_(self.conv.weight, 1 / 27)

        def forward(self, x):
            spot = self.conv(x).flatten(1).amax(1)
            return torch.stack([0 * spot, 0 * spot, 20 * (spot - 0.8), 0 * spot], dim=1)

    model = remembering("small_vgg")
    model.network, model.mean, model.std = Spotted(), torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    curve, known = [], Known(clean=images(64), target=2)
    settings = GDM(search_epochs=20, epochs=1, size=64, batch=16, hidden=64, lr_trigger=1e-2)
    settings(model, known, watch=lambda g: curve.append(g.round))
    success = [float(x["success"]) for x in curve if "success" in x]
    assert success[0] < 0.4
    assert success[-1] > 0.65  # the mean of the three steps is 0.73 at most
    with pytest.raises(Refused, match="`patch` 9"):
        GDM(patch=9).check((3, 8, 8))


# ---- DFAD and ABD


@pytest.mark.parametrize("mistake", ["", "the student in eval mode", "the teacher in train mode", "no generator step"])
def test_dfad_is_the_plain_loop(mistake):
    settings, model = DFAD(iterations=5, student_steps=2, batch=4, lr=0.01), remembering("small_vgg")
    run_state = RunState()
    cleaned = settings(model, seed=3, run_state=run_state)
    S, T = copy.deepcopy(model).train(), copy.deepcopy(model).eval()  # noqa: N806
    if mistake == "the student in eval mode":
        S.eval()
    if mistake == "the teacher in train mode":
        T.train()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        G = ImageGenerator(8, 3)  # noqa: N806
        learn = torch.optim.SGD(S.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        imagine = torch.optim.Adam(G.parameters(), 1e-3)
        rates = [torch.optim.lr_scheduler.MultiStepLR(o, [3, 4], 0.1) for o in (learn, imagine)]
        for _ in range(5):
            for step in range(3):
                x = G(torch.randn(4, NOISE))
                if step == 2 and mistake == "no generator step":
                    continue
                x = x if step == 2 else x.detach()
                loss = (S.logits(x) - T.logits(x)).abs().mean()
                learn.zero_grad()
                imagine.zero_grad()
                (-loss if step == 2 else loss).backward()
                (imagine if step == 2 else learn).step()
            for rate in rates[:1] if mistake == "no generator step" else rates:
                rate.step()
    ours, plain = cleaned.state_dict(), S.state_dict()
    gaps = [float((ours[key] - plain[key]).abs().max() / plain[key].abs().max().clamp_min(1e-3)) for key in plain]
    # Dropout draws from the same state in both, and the teacher in eval mode draws nothing.
    assert (max(gaps) < 1e-3) == (mistake == ""), max(gaps)


def test_a_shuffled_teacher_reads_the_same_filters_in_another_order():
    torch.manual_seed(1)
    model = remembering("resnet8")
    teacher = shuffled(model, 2)
    changed = [name for name, value in teacher.state_dict().items() if not torch.equal(value, model.state_dict()[name])]
    assert changed == ["network.layer3.0.conv1.weight", "network.layer3.0.conv2.weight"]
    for name in changed:
        old, new = model.state_dict()[name], teacher.state_dict()[name]
        assert torch.equal(old.sum((2, 3)).sort(1).values, new.sum((2, 3)).sort(1).values)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_divergence_is_that_of_a_loop_over_images_on_which_both_agree():
    other, answer = np.random.default_rng(0).normal(size=(2, 30, 4))
    total, count = 0.0, 0
    for a, b in zip(other, answer, strict=True):
        if a.argmax() == b.argmax():
            p, q = (np.exp(x) / np.exp(x).sum() for x in (b, a))
            total, count = total + (p * np.log(p / q)).sum() / 4, count + 1
    assert 0 < count < 30
    assert divergence(torch.tensor(other), torch.tensor(answer)).item() == pytest.approx(total / count)
    assert divergence(torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1]])).item() == 0


def test_the_vaccine_makes_a_difference_and_rewards_divergence():
    model, tiny = remembering("small_vgg"), {"iterations": 3, "student_steps": 1, "batch": 4}
    without, with_it = (ABD(**tiny, vaccine=weight)(model, seed=1) for weight in (0.0, 50.0))
    assert not same(without, with_it)
    curve: list = []
    ABD(**tiny)(model, watch=lambda g: curve.append(g.round))
    assert all(x["suspicion"] <= 0 for x in curve)


# ---- inversion


def test_inverted_images_are_taken_for_their_classes_and_come_closer_to_the_statistics():
    model = remembering("resnet8")
    with torch.no_grad():
        model.network.fc.weight.mul_(10)
    torch.manual_seed(0)
    pixels = nn.Parameter(start(model, 16))
    teacher, losses = model.requires_grad_(False), []
    imagine = torch.optim.Adam([pixels], 0.02)
    with BatchStatistics(teacher) as statistics:
        for _ in range(80):
            losses.append(invert(teacher, statistics, pixels, imagine))
    first, late = losses[0], {name: sum(float(x[name].detach()) for x in losses[-20:]) / 20 for name in losses[0]}
    assert late["loss"] < 0.95 * first["loss"].detach()
    assert late["bn_loss"] < 0.7 * first["bn_loss"].detach()
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert (teacher(pixels).argmax(1) == torch.arange(16) % 4).float().mean() >= 0.6


def test_every_batch_is_inverted_for_its_steps_and_then_no_more():
    model, run_state, seen = remembering("small_vgg"), RunState(), []

    def watch(round_info):
        seen.append([batch.detach().clone() for batch in round_info.run_state.part("inverted")])

    DeepInversion(batches=2, batch=8, steps=3, epochs=2)(model, run_state=run_state, watch=watch)
    moved = [[not torch.equal(a, b) for a, b in zip(x, y, strict=True)] for x, y in pairwise(seen)]
    assert moved == [[True, False]] * 2 + [[False, True]] * 3 + [[False, False]] * 2


# ---- OTBR


@pytest.mark.parametrize("even", [True, False])
def test_transport_costs_nearly_what_the_linear_programme_finds(even):
    random = np.random.default_rng(0)
    cost, weight = random.uniform(0, 1, size=(5, 7)), np.ones(7) if even else random.uniform(0.1, 1, size=7)
    plan = transport(torch.tensor(cost), torch.tensor(weight)).numpy()
    np.testing.assert_allclose(plan.sum(0), weight / weight.sum(), atol=1e-6)
    np.testing.assert_allclose(plan.sum(1), np.full(5, 0.2), atol=0.01)
    sums = [np.kron(np.eye(5), np.ones(7)), np.kron(np.ones(5), np.eye(7))]
    exact = optimize.linprog(
        cost.flatten(), A_eq=np.vstack(sums), b_eq=np.concatenate([np.full(5, 0.2), weight / weight.sum()])
    )
    assert (plan * cost).sum() == pytest.approx(exact.fun, rel=0.05)


def test_fusing_touches_nothing_before_the_first_pruned_layer_and_keeps_what_did_not_change():
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, 3, 3), torch.randn(6, 4, 3, 3), torch.randn(5, 6, 3, 3)]
    changes = [torch.full((4,), 0.1), torch.tensor([1.0, 1, 9, 1, 1, 1]), torch.full((5,), 1.0)]
    fused = fuse(weights, changes, 1 / 15, 0.5)
    assert torch.equal(fused[0], weights[0])
    assert fused[1][2].norm() < weights[1][2].norm()  # pruned to nothing, then refilled by what lies near
    kept = [0, 1, 3, 4, 5]
    assert fuse(weights, changes, 1 / 15, 0.0)[1].equal(weights[1])
    near = torch.cosine_similarity(fused[1][kept].flatten(1), weights[1][kept].flatten(1))
    assert near.min() > 0.6
    assert [w.shape for w in fused] == [w.shape for w in weights]


def test_the_share_that_is_pruned_is_chosen_by_agreement_alone():
    model = remembering("resnet8")
    tiny = {"iterations": 2, "batch": 8, "steps": 2}
    shares = {}
    for agreement in (0.0, 1.1):
        curve = []
        cleaned = OTBR(**tiny, agreement=agreement)(model, watch=lambda g, curve=curve: curve.append(g.round))
        shares[agreement] = float(curve[-1]["pruned"]), same(cleaned, model)
    assert shares[0.0] == (pytest.approx(0.3), False)
    assert shares[1.1] == (0.0, True)
