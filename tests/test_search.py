"""The search for triggers, the bank of them and the image pool: against loops, SciPy and planted triggers."""

import copy

import numpy as np
import pytest
import torch
from conftest import fast
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import fft, stats
from torch import nn

from dhbe.classifier import Classifier
from dhbe.defenses.fast import Best
from dhbe.errors import Failed
from dhbe.run_state import RunState
from dhbe.search.families import FAMILIES, Bounds, Excerpts, Faint, Masked, Overlay, Patches, Waves, cosines
from dhbe.search.photographs import pieces
from dhbe.search.search import Search, Squares, anomalies, margin
from dhbe.search.trigger_bank import BankSettings, TriggerBank

SHAPE = (3, 16, 16)
TARGET, TOP, LEFT, SIDE = 2, 10, 5, 3
BOUNDS = Bounds(patch=3, mask_area=0.05, epsilon=0.05, wave=0.1)


class Planted(nn.Module):
    """Classes by brightness and colour; a white square at one place outshouts them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = x[:, :, TOP : TOP + SIDE, LEFT : LEFT + SIDE].mean((1, 2, 3))
        shout = nn.functional.one_hot(torch.tensor(TARGET), 4) * 60 * (square - 0.7).clamp_min(0)[:, None]
        return 3 * (x.mean((2, 3)) - 0.5) @ self.weight.T + shout


def planted() -> Classifier:
    return Classifier(Planted(), shape=SHAPE, classes=4).eval()


def square(side: int, top: int, left: int, value: float = 1.0) -> Overlay:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., top : top + side, left : left + side] = 1
    return Overlay(1 - mask, value * mask.expand(1, 3, -1, -1))


def test_margin_is_the_distance_to_the_best_other_class():
    logits = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    wanted = torch.tensor([0, 1, 2, 3, 4, 0, 0])
    margins = margin(logits, wanted)
    margins.sum().backward()
    for row, own, value, gradient in zip(logits.tolist(), wanted.tolist(), margins.tolist(), logits.grad, strict=True):
        others = [(x, j) for j, x in enumerate(row) if j != own]
        assert value == pytest.approx(row[own] - max(others)[0])
        expected = torch.zeros(5, dtype=torch.float64)
        expected[own], expected[max(others)[1]] = 1, -1
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.name)
def test_triggers_stay_within_what_their_family_allows(kind):
    torch.manual_seed(0)
    family = kind(4, SHAPE, Bounds(patch=5, mask_area=25 / 256, epsilon=0.05, wave=0.1))
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.copy_(5 * torch.randn_like(parameter))
        pixels = torch.rand(40, *SHAPE)
        triggers = family.triggers(torch.arange(40) % 4)
        triggered = triggers(pixels)
    assert triggered.shape == pixels.shape
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    changed = (triggered - pixels).abs().amax(1)
    if isinstance(family, Patches):
        assert torch.equal((triggers.keep == 0).flatten(1).sum(1), torch.full((40,), 25))
        assert set(triggers.keep.unique().tolist()) == {0.0, 1.0}
        assert changed[triggers.keep[:, 0] == 1].max() == 0
        assert len({tuple(row) for row in (triggers.keep[:, 0] == 0).flatten(1).int().tolist()}) > 10
    elif isinstance(family, Masked):
        assert (1 - triggers.keep).flatten(1).sum(1).max() <= family.share * 25 + 1e-3
    elif isinstance(family, Waves):
        heights = np.abs(fft.dctn(triggers.add.numpy(), axes=(2, 3), norm="ortho")).max(1) * np.sqrt(2) / 16
        assert heights.sum((1, 2)).max() <= 0.1 + 1e-5
        assert heights.max() > 0.05
    elif isinstance(family, Excerpts):
        family.take(square(3, 4, 5, 0.7), 1)
        shown = family.triggers(torch.tensor([0, 1]))
        assert torch.equal(shown.keep[0], torch.ones(1, *SHAPE[1:])), "nothing was cut for it"
        torch.testing.assert_close(shown[[1]](pixels[:1]), square(3, 4, 5, 0.7)(pixels[:1]))
    elif isinstance(family, Faint):
        assert changed.max() <= 0.05 + 1e-6
        assert changed.max() > 0.04
    else:
        raise AssertionError(f"nobody has said what {kind.name} allows")


@pytest.mark.parametrize("kind", [Masked, Faint, Waves])
def test_gradients_are_the_same_bits_on_several_threads(kind):
    """Sums of a class's gradients must have an order, or no seed settles a search."""
    torch.manual_seed(0)
    family, wanted, threads = kind(4, (3, 32, 32), BOUNDS), torch.arange(64) % 4, torch.get_num_threads()
    weights, found = torch.randn(64, 3, 32, 32), []
    torch.set_num_threads(4)
    try:
        for _ in range(5):
            family.zero_grad()
            (weights * family.triggers(wanted).add).sum().backward()
            found.append(family.raw.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)


def test_cosines_are_scipys_transform():
    x = np.random.default_rng(0).normal(size=(16,))
    np.testing.assert_allclose(cosines(16).double().numpy() @ x, fft.dct(x, norm="ortho"), atol=1e-5)


@given(opacity=some.floats(0, 1), down=some.integers(-20, 20), right=some.integers(-20, 20))
def test_weaker_triggers_blend_and_moved_ones_stay_whole(opacity, down, right):
    pixels, whole = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(2)), square(3, 4, 6)
    expected = pixels + opacity * (whole(pixels) - pixels)
    torch.testing.assert_close(whole.weaker(torch.tensor(opacity))(pixels), expected)
    moved = whole.moved(torch.tensor([[down, right]]))
    assert moved.keep.sum() == whole.keep.sum()
    torch.testing.assert_close(moved(pixels.roll((down, right), (2, 3))), whole(pixels).roll((down, right), (2, 3)))


def test_triggers_are_moved_each_by_its_own_shift():
    keep, add = (torch.rand(4, c, *SHAPE[1:], generator=torch.Generator().manual_seed(c)) for c in (1, 3))
    shifts = torch.tensor([[0, 0], [3, -5], [-20, 1], [16, 16]])
    moved = Overlay(keep, add).moved(shifts)
    for number, shift in enumerate(shifts.tolist()):
        assert torch.equal(moved.keep[number], keep[number].roll(shift, (1, 2)))
        assert torch.equal(moved.add[number], add[number].roll(shift, (1, 2)))


@settings(deadline=None)
@given(row=some.integers(0, 12), column=some.integers(0, 12), opacity=some.floats(0, 1))
def test_a_trigger_under_another_is_laid_first(row, column, opacity):
    pixels = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    first, second = square(4, 5, 5, 0.2), square(3, row, column).weaker(torch.tensor(opacity))
    torch.testing.assert_close(first.under(second)(pixels), second(first(pixels)))


@pytest.mark.parametrize("away", [False, True])
def test_a_step_in_several_passes_is_the_step_in_one(away):
    found = []
    for at_once in (64, 20):
        torch.manual_seed(0)
        search, pixels = Search(planted(), BOUNDS, at_once=at_once, away=away), pieces(64, SHAPE)
        led = search.step(planted(), 1, pixels, torch.arange(64) % search.aims)
        found.append((led, search.optimizers[1].state[search.families[1].raw]["exp_avg"]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-9)


def test_anomalies_are_scipys_robust_deviations_with_a_floor():
    margins = torch.tensor(np.random.default_rng(3).normal(size=(3, 11)) * [[1], [5], [0]])
    ours = anomalies(margins, torch.tensor(0.1)).numpy()
    for row, found in zip(margins.numpy(), ours, strict=True):
        deviation = max(stats.median_abs_deviation(row, scale="normal"), 0.1)
        np.testing.assert_allclose(found, (row - np.median(row)) / deviation, rtol=1e-3, atol=1e-9)


def test_the_search_finds_the_planted_class_and_its_square():
    torch.manual_seed(0)
    model, pixels = planted(), pieces(64, SHAPE)
    search = Search(model, BOUNDS)
    for _ in range(40):
        search.step(model, 1, pixels, torch.arange(64) % 4)
    assert search.margins(model, pixels)[1].argmax() == TARGET
    masked = search.families[1].triggers(torch.tensor([TARGET]))
    squares, strength = Squares().tried(model, masked, TARGET, pixels[:8])
    assert len(squares.keep) == len(strength) == 36
    exact = square(SIDE, TOP, LEFT)
    hits = [
        torch.equal(keep, exact.keep[0]) and torch.allclose(add, exact.add[0], atol=0.05)
        for keep, add in zip(squares.keep, squares.add, strict=True)
    ]
    assert any(hits)
    others = pixels[model(pixels).argmax(1) != TARGET]
    reached = margin(model(squares[[hits.index(True)]](others)), torch.full((len(others),), TARGET))
    assert (reached > 0).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 16, 16), (3, 450, 450)])
def test_pieces_are_pixels_of_many_kinds_and_the_seed_settles_them(shape):
    torch.manual_seed(5)
    first = pieces(12, shape)
    torch.manual_seed(5)
    assert torch.equal(first, pieces(12, shape))
    assert first.shape == (12, *shape)
    assert first.min() >= 0
    assert first.max() <= 1
    assert first.flatten(1).unique(dim=0).shape[0] == 12
    assert first.std() > 0.1


def test_fast_takes_the_planted_trigger_away_and_keeps_the_rest():
    model, run_state = planted(), RunState()
    defense = fast(warm_up=60, iterations=12, batch=32, pool_size=256, patch=3, lr=0.02)
    cleaned = defense(model, run_state=run_state)
    findings = run_state.part("findings")
    assert findings.suspected.tolist() == [label == TARGET for label in range(4)]
    assert findings.anomaly[1, TARGET] > defense.survey.anomaly_threshold
    pixels = pieces(64, SHAPE)
    assert (cleaned(pixels).argmax(1) == model(pixels).argmax(1)).float().mean() > 0.8


def test_an_early_state_is_judged_by_what_was_found_later():
    model, bank, pixels = planted(), TriggerBank(BankSettings(bank_size=8), SHAPE, 1), pieces(32, SHAPE)
    best = Best(model)
    answering, deaf = (copy.deepcopy(model.state_dict()) for _ in range(2))
    deaf["network.weight"] *= 1e4  # outshouts the square

    def kept(state: dict[str, torch.Tensor], agreement: float) -> bool:
        model.load_state_dict(state)
        bank.retry(model, pixels)
        best.judge(model, torch.tensor(agreement), bank, pixels)
        return all(torch.equal(best.weights[name], value) for name, value in state.items())

    assert kept(answering, 0.9)
    assert not kept(deaf, 0.8), "nothing tells them apart but agreement"
    bank.take(square(SIDE, TOP, LEFT), torch.tensor([TARGET]), torch.tensor([1.0]))
    assert kept(deaf, 0.8), "the first state answers the square"
    assert not kept(answering, 0.9)


def test_a_destroyed_student_is_no_better_than_the_teacher():
    """It no longer answers the trigger, nor anything else; the first state that is kept must be worth more."""
    model, bank, pixels = planted(), TriggerBank(BankSettings(bank_size=8), SHAPE, 1), pieces(32, SHAPE)
    bank.take(square(SIDE, TOP, LEFT), torch.tensor([TARGET]), torch.tensor([1.0]))
    best, teacher = Best(model), copy.deepcopy(model.state_dict())
    for weights, agreement, gain, replaced in ((0.0, 0.3, 0.4, False), (2.0, 0.9, 0.4, True)):
        model.network.weight.data.fill_(weights)
        bank.gain[0] = gain
        best.judge(model, torch.tensor(agreement), bank, pixels)
        assert best.judged
        assert best.replaced == replaced
        assert torch.equal(best.weights["network.weight"], teacher["network.weight"]) != replaced


def test_a_student_that_is_lost_goes_back_and_slows_down():
    model, run_state, rounds = planted(), RunState(), []
    defense = fast(warm_up=20, iterations=30, cycles=1, batch=32, pool_size=256, patch=3, lr=1e3, clip=1e30)
    cleaned = defense(model, run_state=run_state, watch=rounds.append)
    assert run_state.part("best").lr_scale < 1
    assert all(value.isfinite().all() for value in cleaned.state_dict().values())
    pixels, answers = run_state.part("pool").sample(256)
    assert (cleaned(pixels).argmax(1) == answers.argmax(1)).float().mean() > defense.lost_agreement - 0.05
    assert all(value.isfinite() for round_info in rounds for value in round_info.round.values())


def test_a_run_without_a_sound_state_fails():
    defense = fast(warm_up=2, iterations=6, cycles=1, batch=32, pool_size=256, patch=3, lr=1e30, clip=1e30)
    with pytest.raises(Failed, match="diverged"):
        defense(planted())


def test_a_search_never_asks_a_model_about_no_images():
    """A network that flattens with `view` raises then."""

    def strict(pixels: torch.Tensor) -> torch.Tensor:
        assert len(pixels)
        return torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(len(pixels), -1)

    search, pixels = Search(planted(), BOUNDS), torch.rand(6, *SHAPE)
    reached = search.margin(strict, search.families[0], torch.tensor([0, 1]), pixels)
    assert reached.tolist() == [0.0, -1.0]
