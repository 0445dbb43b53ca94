"""The method against a plain re-statement of its text."""

import copy
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
from conftest import MEAN, STD, victim
from torch import nn

from dhbe.classifier import Classifier
from dhbe.defenses.dhbe import DHBE, OFFICIAL, PAPER
from dhbe.generators import NOISE, ImageGenerator, TriggerGenerator
from dhbe.run_state import RunState
from dhbe.steps import stepped

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
    run_state = RunState()
    cleaned = settings(model, seed=seed, run_state=run_state)
    return [x.state_dict() for x in (cleaned.network, run_state.part("images"), run_state.part("triggers"))]


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
        "patch": 5, "scale": 1.0, "places": "batch", "engine": "eager",
    }  # fmt: skip
    assert asdict(PAPER) == common | {"student_steps": 3, "batch": 128, "smooth": 0.0, "detach_clean": False}
    assert asdict(OFFICIAL) == common | {"student_steps": 5, "batch": 256, "smooth": 1e-4, "detach_clean": True}
    for preset in (PAPER, OFFICIAL):
        changes = {8999: 1.0, 9000: 0.1, 11_999: 0.1, 12_000: 0.01, 14_999: 0.01}
        assert {iteration: stepped(iteration / preset.iterations) for iteration in changes} == changes


def test_rates_fall_in_all_three_optimisers():
    seen = []

    def watch(round_info):
        parts = (round_info.run_state.part(name) for name in ("learn", "imagine", "attack"))
        seen.append([part.param_groups[0]["lr"] for part in parts])

    replace(PAPER, iterations=10, student_steps=1, batch=2, patch=3)(victim(), watch=watch)
    shares = [1.0] * 6 + [0.1] * 2 + [0.01] * 2
    np.testing.assert_allclose(seen, [[0.1 * share, 1e-3 * share, 1e-3 * share] for share in shares])


def test_noise_has_the_length_of_the_text():
    assert NOISE == 256
