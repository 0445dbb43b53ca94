"""The method against a plain re-statement of it, its losses against loops, and what every defence must keep to."""

import copy
import dataclasses
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.defenses import ALL, PRESETS, Defense, Known, Ledger
from dhbe.defenses.dhbe import DHBE, OFFICIAL, PAPER
from dhbe.defenses.fast import FastDHBE
from dhbe.defenses.parts import descend, frozen, gap, lay, set_lr, variation
from dhbe.defenses.statistics import BatchStatistics, imbalance
from dhbe.errors import Refused
from dhbe.generators import NOISE, ImageGenerator, TriggerGenerator

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def double():
    """Everything in float64, so that tolerances can be tight."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def victim(side=8, classes=4, seed=0) -> Classifier:
    """A small network whose BatchNorm layers remember something, in eval mode."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(20):
            network(1.5 * torch.randn(16, 3, side, side) + 0.3)
        network[-1].weight.mul_(8)
    return Classifier(network, shape=(3, side, side), classes=classes, mean=MEAN, std=STD).eval()


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


# ---- the method, stated once more from the text


def plain_images(side: int) -> nn.Sequential:
    assert side == 16
    return nn.Sequential(
        nn.Linear(256, 128 * 64), nn.Unflatten(1, (128, 8, 8)), nn.BatchNorm2d(128),
        nn.Upsample(scale_factor=2), nn.Conv2d(128, 64, 3, padding=1), nn.BatchNorm2d(64), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 3, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(3, affine=False),
    )  # fmt: skip


def plain_triggers(side: int) -> nn.Sequential:
    double = [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.LeakyReLU(0.2)]
    first = side if side <= 9 else side // 2
    return nn.Sequential(
        nn.Linear(256, 64 * first**2), nn.Unflatten(1, (64, first, first)), nn.BatchNorm2d(64),
        *(double if side > 9 else []),
        nn.Conv2d(64, 3, 3, padding=1), nn.BatchNorm2d(3, affine=False), nn.Tanh(),
    )  # fmt: skip


def filled(plain: nn.Module, given: nn.Module) -> nn.Module:
    """The plain network with the given one's weights, which must come in the same order and shapes."""
    for mine, other in zip(plain.state_dict().values(), given.state_dict().values(), strict=True):
        assert mine.shape == other.shape
        mine.copy_(other)
    return plain


@dataclass(frozen=True)
class Text:
    """What a preset says, in the text's words."""

    k: int
    batch: int
    alpha: float
    prior: float
    symmetric: bool
    p: int


def restated(
    victim: Classifier, text: Text, epochs: int, seed: int, mistake: str = ""
) -> list[dict[str, torch.Tensor]]:
    """States of S, G and R after so many iterations, by the plainest means, with a mistake of our choice.

    Logits and normalisation constants are float32, as a Classifier has them: Adam makes much of the least difference.
    """
    S, T = copy.deepcopy(victim.network).train(), copy.deepcopy(victim.network).eval()  # noqa: N806
    if mistake == "the student in eval mode":
        S.eval()
    if mistake == "the teacher in train mode":
        T.train()
    side = victim.shape[1]
    G, R = plain_images(side), plain_triggers(text.p)  # noqa: N806
    mean, std = (torch.tensor(x, dtype=torch.float32).view(1, 3, 1, 1) for x in (MEAN, STD))
    torch.manual_seed(seed)
    filled(G, ImageGenerator(side, 3))
    filled(R, TriggerGenerator(text.p, 3))
    plain = {"foreach": False, "fused": False}
    momentum = 0.0 if mistake == "no momentum" else 0.9
    optimizers = [
        torch.optim.SGD(S.parameters(), 0.1, momentum=momentum, weight_decay=5e-4, **plain),
        torch.optim.Adam(G.parameters(), 1e-3, **plain),
        torch.optim.Adam(R.parameters(), 1e-3, **plain),
    ]
    milestones = [] if mistake == "no decay" else [epochs * 6 // 10, epochs * 8 // 10]
    schedules = [torch.optim.lr_scheduler.MultiStepLR(o, milestones, 0.1) for o in optimizers]

    def trigger(x):
        patches = R(torch.randn(text.batch, 256))
        top, left = (torch.randint(side - text.p + 1, (1,)).item() for _ in range(2))
        canvas = torch.zeros_like(x)
        for i in range(text.batch):
            if mistake == "a place for each image":
                top, left = (top + 1) % (side - text.p + 1), (left + 3) % (side - text.p + 1)
            for row in range(text.p):
                canvas[i, :, top + row, left : left + text.p] = patches[i, :, row]
        if mistake == "the patch added to normalised values":
            return x + canvas
        pixels = x * std + mean + canvas
        return ((pixels.clamp(0, 1) if mistake == "the sum clipped" else pixels) - mean) / std

    def student(x):
        return S(x).float()

    def mean_gap(a, b):
        return (a - b).abs().sum() / a.numel()

    def prior(x):
        directions = (
            x[:, :, 1:] - x[:, :, :-1],
            x[:, :, :, 1:] - x[:, :, :, :-1],
            x[:, :, 1:, 1:] - x[:, :, :-1, :-1],
            x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
        )
        total = sum(d.pow(2).sum().sqrt() for d in directions)
        return total / len(x) if mistake == "the prior averaged" else total

    def step(which, loss):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        optimizers[which].step()

    for _ in range(epochs):
        for _ in range(text.k):
            x = G(torch.randn(text.batch, 256)).detach()
            triggered = trigger(x).detach()
            if mistake == "clean and triggered images in one batch":
                s, s_triggered = student(torch.cat([x, triggered])).chunk(2)
            else:
                s, s_triggered = student(x), student(triggered)
            symmetric = text.symmetric != (mistake == "the clean branch's gradient")
            restriction = mean_gap(s_triggered, s if symmetric else s.detach())
            step(0, mean_gap(s, T(x).float().detach()) + text.alpha * restriction)
        if mistake == "the student in eval mode for the generators' steps":
            S.eval()
        x = G(torch.randn(text.batch, 256))
        step(1, -mean_gap(student(x), T(x).float()) + text.prior * prior(x))
        x = G(torch.randn(text.batch, 256)).detach()
        if mistake == "triggered images before clean ones":
            s_triggered, s = student(trigger(x)), student(x)
        else:
            s, s_triggered = student(x), student(trigger(x))
        step(2, -mean_gap(s_triggered, s.detach()))
        if mistake == "the student in eval mode for the generators' steps":
            S.train()
        for schedule in schedules:
            schedule.step()
    return [network.state_dict() for network in (S, G, R)]


TEXTS = {
    "official": (OFFICIAL, Text(k=5, batch=8, alpha=0.1, prior=1e-4, symmetric=False, p=5)),
    "paper": (PAPER, Text(k=3, batch=8, alpha=0.1, prior=0.0, symmetric=True, p=10)),
}
MISTAKES = [
    "the student in eval mode",
    "the student in eval mode for the generators' steps",
    "the teacher in train mode",
    "clean and triggered images in one batch",
    "the clean branch's gradient",
    "a place for each image",
    "the patch added to normalised values",
    "the sum clipped",
    "no momentum",
    "no decay",
    "triggered images before clean ones",
    "the prior averaged",
]
ITERATIONS = 5  # the rates fall after the third and after the fourth
EXACT = 1e-7


def ours(preset: DHBE, text: Text, model: Classifier, seed: int, **changes) -> list[dict[str, torch.Tensor]]:
    """States of student and generators after so many iterations of the package."""
    settings = replace(preset, iterations=ITERATIONS, student_steps=text.k, batch=text.batch, patch=text.p, **changes)
    ledger = Ledger()
    cleaned = settings(model, seed=seed, ledger=ledger)
    return [x.state_dict() for x in (cleaned.network, ledger.part("images"), ledger.part("triggers"))]


def distance(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> list[float]:
    """For each network, the greatest difference of a tensor relative to the greatest value in it."""
    return [
        max(
            float((one - other).abs().max() / other.abs().max().clamp_min(1e-3))
            for one, other in zip(x.values(), y.values(), strict=True)
        )
        for x, y in zip(a, b, strict=True)
    ]


@pytest.mark.parametrize("name", TEXTS)
def test_iterations_are_those_of_the_text(name, double):
    preset, text = TEXTS[name]
    model = victim(side=16)
    result, expected = ours(preset, text, model, seed=7), restated(model, text, ITERATIONS, seed=7)
    assert max(distance(result, expected)) < EXACT
    statistics = [key for key in expected[0] if "running" in key]
    assert len(statistics) == 4
    batches = ITERATIONS * (2 * text.k + 3)  # in the student: clean and triggered apart, G's batch, R's two
    assert result[0]["1.num_batches_tracked"] == 20 + batches
    for key in statistics:
        assert not torch.allclose(result[0][key], model.network.state_dict()[key], rtol=1e-2)


@pytest.fixture(scope="module")
def short_official() -> tuple[Classifier, Text, list[dict[str, torch.Tensor]]]:
    torch.set_default_dtype(torch.float64)
    preset, text = TEXTS["official"]
    text, model = replace(text, k=2), victim(side=16)
    result = ours(preset, text, model, seed=7)
    torch.set_default_dtype(torch.float32)
    return model, text, result


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_restatement_would_show_a_mistake(mistake, short_official, double):
    model, text, result = short_official
    wrong = restated(model, text, ITERATIONS, 7, mistake)
    assert max(distance(result, wrong)) > 1e-3
    if "mode" in mistake or "batch" in mistake or "before" in mistake:
        statistics = [{key: value for key, value in x[0].items() if "running" in key} for x in (result, wrong)]
        assert distance(statistics[:1], statistics[1:]) > [1e-3]


def test_restriction_without_weight_still_moves_the_statistics(double):
    preset, text = TEXTS["official"]
    text, model = replace(text, k=2), victim(side=16)
    result = ours(preset, text, model, seed=7, alpha=0.0)
    assert max(distance(result, restated(model, replace(text, alpha=0.0), ITERATIONS, seed=7))) < EXACT


def test_places_may_be_drawn_for_each_image():
    model = victim(side=16)
    preset, text = TEXTS["official"]
    a, b = ours(preset, text, model, 7), ours(preset, text, model, 7, places="sample")
    assert distance(a, b)[0] > 1e-3


def test_exact_presets_are_those_of_the_paper_and_of_the_script():
    common = {
        "iterations": 300 * 50, "alpha": 0.1, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "lr_generators": 1e-3,
        "patch": 5, "scale": 1.0, "places": "batch",
    }  # fmt: skip
    assert asdict(PAPER) == common | {"student_steps": 3, "batch": 128, "smooth": 0.0, "detach_clean": False}
    assert asdict(OFFICIAL) == common | {"student_steps": 5, "batch": 256, "smooth": 1e-4, "detach_clean": True}
    for preset in (PAPER, OFFICIAL):
        changes = {8999: 1.0, 9000: 0.1, 11_999: 0.1, 12_000: 0.01, 14_999: 0.01}
        assert {iteration: preset.rate(iteration) for iteration in changes} == changes


def test_rates_fall_in_all_three_optimisers():
    seen = []

    def watch(glimpse):
        parts = (glimpse.ledger.part(name) for name in ("learn", "imagine", "attack"))
        seen.append([part.param_groups[0]["lr"] for part in parts])

    replace(PAPER, iterations=10, student_steps=1, batch=2, patch=3)(victim(), watch=watch)
    shares = [1.0] * 6 + [0.1] * 2 + [0.01] * 2
    np.testing.assert_allclose(seen, [[0.1 * share, 1e-3 * share, 1e-3 * share] for share in shares])


# ---- what `fast` promises

TINY = {"iterations": 3, "cycles": 2, "warm_up": 2, "student_steps": 2, "batch": 4, "album": 10, "patch": 3}


def tiny(settings: Defense) -> Defense:
    """The same with settings that take no time."""
    names = {field.name for field in dataclasses.fields(settings)}
    return replace(settings, **{name: value for name, value in TINY.items() if name in names})


def test_fast_keeps_the_teachers_statistics_and_its_rate_rises_and_falls():
    fast, model = tiny(FastDHBE()), victim()
    cleaned = fast(model)
    for (name, before), after in zip(model.state_dict().items(), cleaned.state_dict().values(), strict=True):
        kept = "running" in name or "tracked" in name
        assert torch.equal(before, after) == kept, name
    rates = [FastDHBE(iterations=100).rate(i) for i in range(100)]
    assert np.argmax(rates) == 9
    assert rates[9] == 1
    assert np.all(np.diff(rates[:10]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)
    assert 0 < rates[-1] < 0.02


def test_fast_answers_in_the_album_are_the_teachers():
    model, ledger = victim(), Ledger()
    tiny(FastDHBE())(model, ledger=ledger)
    album = ledger.part("album")
    with torch.no_grad():
        answers = model(album.pixels.float() / 255)
    torch.testing.assert_close(album.answers, answers)
    assert album.answers.std() > 0.1


def test_fast_moves_only_the_generators_while_it_warms_up():
    model, states = victim(), []
    tiny(FastDHBE())(model, watch=lambda glimpse: states.append(copy.deepcopy(glimpse.model.state_dict())))
    moved = [
        any(not torch.equal(a, b) for a, b in zip(s.values(), model.state_dict().values(), strict=True)) for s in states
    ]
    assert moved == [False, False, True, True, True]


# ---- what every defence keeps to

DEFENSES = {
    **{name: tiny(settings) for name, settings in PRESETS.items()},
    "own places": tiny(replace(PAPER, places="sample")),
}
every = pytest.mark.parametrize("defense", DEFENSES.values(), ids=DEFENSES)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_every_kind_of_defence_is_listed_under_its_own_name():
    assert {type(preset) for preset in PRESETS.values()} == set(ALL.values())
    assert {FastDHBE, DHBE} <= set(ALL.values())
    assert all(kind.name == name for name, kind in ALL.items())


@every
def test_victim_and_random_state_stay_and_the_result_is_in_eval_mode(defense):
    model = victim().train()
    model.network[1].eval()
    before = copy.deepcopy(model)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rounds = []
    cleaned = defense(model, watch=rounds.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module.training for module in cleaned.modules())
    assert not same(cleaned, model)
    assert all(value.isfinite().all() for value in cleaned.state_dict().values())
    assert len({p.data_ptr() for p in [*cleaned.parameters(), *model.parameters()]}) == 2 * len([*model.parameters()])
    assert [(glimpse.number, glimpse.total) for glimpse in rounds] == [
        (i + 1, defense.rounds) for i in range(len(rounds))
    ]
    assert 0 < len(rounds) <= defense.rounds  # `fast` may stop before
    assert all(value.ndim == 0 and value.isfinite() for glimpse in rounds for value in glimpse.round.values())


@every
def test_random_state_stays_also_when_the_watcher_stops_the_run(defense):
    model = victim()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        defense(model, watch=lambda glimpse: (_ for _ in ()).throw(RuntimeError))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.ones(()).device.type == "cpu"


@every
def test_the_seed_settles_everything(defense):
    model = victim()
    torch.manual_seed(11)
    first = defense(model, seed=3)
    torch.manual_seed(12)
    assert same(first, defense(model, seed=3))
    assert not same(first, defense(model, seed=4))


@every
def test_looking_changes_nothing(defense):
    model = victim()

    def watch(glimpse):
        torch.manual_seed(99)
        torch.rand(3)
        assert not any(module.training for module in glimpse.model.modules())
        glimpse.model(torch.rand(4, 3, 8, 8))
        defense.scene(glimpse.model, glimpse.ledger, 6, seed=glimpse.number)

    assert same(defense(model), defense(model, watch=watch))


@every
def test_scenes_are_the_same_for_a_seed_and_show_what_is_said(defense):
    model, ledger = victim(), Ledger()
    defense(model, ledger=ledger)
    state = torch.get_rng_state()
    scene, again = (defense.scene(model, ledger, 7, seed=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("pixels", "triggered", "patches"):
        assert torch.equal(getattr(scene, name), getattr(again, name))
        assert not getattr(scene, name).requires_grad
    assert scene.pixels.shape == scene.triggered.shape == (7, 3, 8, 8)
    side = 8 if isinstance(defense, FastDHBE) else 3  # its triggers are shown on grey images
    assert scene.patches.shape == (7, 3, side, side)
    assert 0 <= scene.patches.min() <= scene.patches.max() <= 1
    changed = (scene.triggered - scene.pixels).abs().amax(1) > 1e-5
    assert 0 < changed.sum((1, 2)).max() <= side**2


@every
def test_hyperparameters_survive_json(defense):
    assert type(defense)(**json.loads(json.dumps(asdict(defense)))) == defense


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@every
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(defense, precision):
    model, saved, curves = victim(), [], []

    def watch(glimpse):
        torch.rand(5)
        file = io.BytesIO()
        torch.save(ledger.state(), file)
        saved.append(file.getvalue())
        curves.append({name: value.item() for name, value in glimpse.round.items()})

    ledger = Ledger()
    whole = defense(model, seed=3, precision=precision, watch=watch, ledger=ledger)
    for done, state in enumerate(saved, start=1):
        torch.rand(done)
        rest = []
        ledger = Ledger(torch.load(io.BytesIO(state), weights_only=True))
        resumed = defense(model, seed=3, precision=precision, ledger=ledger, watch=rest.append)
        assert same(resumed, whole), f"after round {done}"
        assert [g.number for g in rest] == list(range(done + 1, len(saved) + 1))
        assert [{name: value.item() for name, value in g.round.items()} for g in rest] == curves[done:]


@every
def test_bf16_is_left_behind(defense):
    model = victim()
    exact, rough = defense(model), defense(model, precision="bf16")
    assert not same(exact, rough)
    assert all(value.isfinite().all() for value in rough.state_dict().values())
    assert all(value.dtype != torch.bfloat16 for value in rough.state_dict().values())
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


@dataclass(frozen=True)
class Fitting(Defense):
    """Learns to answer with -1 by gradient descent on a square, which cannot be done with the weights of long ago."""

    name: ClassVar[str] = "fitting"
    needs: ClassVar[frozenset] = frozenset()

    @property
    def rounds(self) -> int:
        return 30

    def run(self, model: Classifier, known: Known, ledger: Ledger) -> Iterator[dict[str, torch.Tensor]]:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        images = torch.rand(32, 3, 8, 8)
        ledger.keep(model=model, optimizer=optimizer)
        for _ in range(self.rounds):
            with torch.no_grad():
                model(images)
            loss = (model(images) + 1).square().mean()
            descend(optimizer, loss)
            yield {"loss": loss}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_step_sees_the_weights_of_the_step_before(precision):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    losses = []
    Fitting()(
        Classifier(network, shape=(3, 8, 8), classes=4, mean=MEAN, std=STD),
        precision=precision,
        watch=lambda glimpse: losses.append(glimpse.round["loss"].item()),
    )
    assert losses[0] > 2
    assert losses[-1] < 0.5


@every
def test_bad_settings_are_refused(defense):
    defense.check((3, 8, 8))
    defense.check((1, 28, 28))
    for shape in ((3, 8, 9), (3, 7, 7), (2, 8, 8), (4, 8, 8)):
        with pytest.raises(Refused, match="--input"):
            defense.check(shape)
    bad = {"patch": (0, 9, -1), "batch": (0, -4), "iterations": (0,), "student_steps": (0,), "album": (0,)}
    for field in dataclasses.fields(defense):
        if isinstance(getattr(defense, field.name), int | float) and field.type is not bool:
            for value in (*bad.get(field.name, ()), -0.5, math.nan, math.inf):
                if isinstance(getattr(defense, field.name), bool):
                    continue
                with pytest.raises(Refused, match=f"--{field.name.replace('_', '-')} "):
                    replace(defense, **{field.name: value}).check((3, 8, 8))


@pytest.mark.parametrize("settings", [{"batch": 1}, {"batch": 2}, {"batch": 3}, {"album": 2}], ids=str)
@every
def test_what_is_not_refused_runs(defense, settings):
    names = {field.name for field in dataclasses.fields(defense)}
    if not settings.keys() <= names:
        pytest.skip("not a setting of this defence")
    defense = replace(defense, patch=1, **settings)
    try:
        defense.check((3, 8, 8))
    except Refused:
        return
    assert all(value.isfinite().all() for value in defense(victim()).state_dict().values())


@pytest.mark.parametrize("warm_up", [0, 1, 2])
def test_fast_shows_the_student_no_image_before_the_teacher_has_answered(warm_up):
    fast = replace(tiny(FastDHBE()), warm_up=warm_up, student_steps=1)
    try:
        fast.check((3, 8, 8))
    except Refused:
        assert warm_up == 0
        return
    losses = []
    fast(victim(), watch=lambda glimpse: losses.append(glimpse.round))
    assert losses[warm_up]["distillation"] < 0.05  # as yet the two are the same


IMAGES = Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), ("a", "b", "c", "d"))


@dataclass(frozen=True)
class Curious(Defense):
    """Notes what it is handed."""

    name: ClassVar[str] = "curious"
    needs: ClassVar[frozenset] = frozenset()
    handed: ClassVar[list[Known]] = []

    @property
    def rounds(self) -> int:
        return 1

    def run(self, model: Classifier, known: Known, ledger: Ledger) -> Iterator[dict[str, torch.Tensor]]:
        assert all(module.training for module in model.modules())
        self.handed.append(known)
        ledger.keep(model=model)
        yield {}


class NeedsImages(Curious):
    needs = frozenset({"clean images"})


class NeedsAll(Curious):
    needs = frozenset({"clean images", "target class"})


def test_a_defence_is_handed_what_it_needs_and_nothing_else():
    everything = Known(clean=IMAGES, target=0)
    Curious.handed.clear()
    for kind in (Curious, NeedsImages, NeedsAll):
        kind()(victim(), everything)
    assert Curious.handed == [Known(), Known(clean=IMAGES), everything]
    Curious.handed.clear()
    for lacking in (Known(), Known(target=1)):
        with pytest.raises(Refused, match="needs clean images"):
            NeedsImages()(victim(), lacking)
    with pytest.raises(Refused, match="needs target class"):
        NeedsAll()(victim(), Known(clean=IMAGES))
    assert Curious.handed == []


@every
def test_erasers_need_nothing_and_clean_images_make_no_difference(defense):
    assert defense.needs == frozenset()
    assert same(defense(victim()), defense(victim(), Known(clean=IMAGES, target=1)))


def test_noise_has_the_length_of_the_text():
    assert NOISE == 256
