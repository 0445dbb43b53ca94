"""The bank of triggers and the pool of images: what is kept, shown and left out."""

import pytest
import torch
from test_search import LEFT, SHAPE, SIDE, TARGET, TOP, planted, square

from dhbe.search.families import Overlay
from dhbe.search.image_pool import ImagePool
from dhbe.search.photographs import pieces
from dhbe.search.search import margin
from dhbe.search.survey import EXCERPTS, Survey, SurveyState
from dhbe.search.trigger_bank import BankSettings, TriggerBank


def test_a_full_bank_forgets_only_the_weakest():
    bank = TriggerBank(BankSettings(bank_size=3), SHAPE, classes=0)
    for strength in (5.0, 1.0, 3.0, 2.0, 0.5):
        bank.take(square(1, int(strength), 0), torch.tensor([int(strength) % 4]), torch.tensor([strength]))
    assert sorted(bank.strength.tolist()) == [2.0, 3.0, 5.0]
    assert len(bank) == 3
    assert sorted(bank.wanted.tolist()) == [1, 2, 3]


def test_a_bank_shows_what_still_acts():
    torch.manual_seed(0)
    model, bank = planted(), TriggerBank(BankSettings(bank_size=8, rehearsal=0.0), SHAPE, classes=1)
    for side, top, left, value in ((SIDE, TOP, LEFT, 1.0), (SIDE, 0, 0, 1.0), (SIDE, TOP, LEFT, 0.1)):
        bank.take(square(side, top, left, value), torch.tensor([TARGET]), torch.tensor([1.0]))
    pixels = pieces(32, SHAPE)
    bank.retry(model, pixels)
    alone, wanted = pixels[:16], torch.full((16,), TARGET)
    acting = margin(model(square(SIDE, TOP, LEFT)(alone)), wanted).sigmoid() - margin(model(alone), wanted).sigmoid()
    assert bank.gain[0].item() == pytest.approx(acting.clamp_min(0).mean().item(), rel=1e-5)
    assert bank.gain[0] > 3 * bank.gain[1:].max()
    drawn, wanted = bank.draw(200)
    assert wanted.eq(TARGET).all()
    assert (drawn.add.amax((1, 2, 3)) > 0.4).sum() > 180
    covered = (drawn.keep < 0.9).sum((1, 2, 3))
    assert 120 < (covered > SIDE**2).sum() < 180
    assert covered.max() <= bank.settings.room * SHAPE[1] * SHAPE[2]
    assert covered.min() == SIDE**2


def test_what_acts_among_copies_alone_counts():
    """A model that answers so many white pixels, wherever they lie: one square is too few, nine suffice."""
    torch.manual_seed(0)

    def counting(pixels: torch.Tensor) -> torch.Tensor:
        white = (pixels.amin(1) > 0.99).float().sum((1, 2))
        return torch.stack([white - 4 * SIDE**2, 0 * white], dim=1)

    bank, pixels = TriggerBank(BankSettings(bank_size=2), SHAPE, classes=0), torch.full((8, *SHAPE), 0.5)
    bank.take(square(SIDE, TOP, LEFT, 1.0), torch.tensor([0]), torch.tensor([1.0]))
    bank.retry(counting, pixels)
    assert bank.gain[0] > 0.9


def test_a_share_of_what_a_bank_shows_is_drawn_from_all_alike():
    torch.manual_seed(0)
    for rehearsal, quiet in ((0.0, 0), (0.3, 200), (1.0, 667)):
        bank = TriggerBank(BankSettings(bank_size=8, rehearsal=rehearsal, room=0.0), SHAPE, classes=1)
        for value in (1.0, 0.2, 0.1):
            bank.take(square(SIDE, TOP, LEFT, value), torch.tensor([TARGET]), torch.tensor([1.0]))
        bank.gain[:3] = torch.tensor([1.0, 0.0, 0.0])
        drawn = (bank.draw(1000)[0].add.amax((1, 2, 3)) < 0.4).sum()
        assert abs(int(drawn) - quiet) < 60


def test_triggers_that_act_at_their_place_alone_stay_there():
    torch.manual_seed(0)
    bank = TriggerBank(BankSettings(bank_size=8), SHAPE, classes=1)
    bank.take(square(SIDE, TOP, LEFT, 1.0), torch.tensor([TARGET]), torch.tensor([1.0]))
    bank.gain[0] = 1
    for invariant in (True, False):
        bank.place_invariant.fill_(invariant)
        shown = bank.draw(100)[0].keep[:, 0, TOP : TOP + SIDE, LEFT : LEFT + SIDE].amax((1, 2)) < 0.6
        assert shown.all() != invariant


def test_a_pool_can_show_as_many_of_each_class():
    torch.manual_seed(0)
    pool = ImagePool(100, SHAPE, 4)
    pool.answers[:, 0], pool.answers[:10, 2], pool.answers[10:12, 1] = (
        1,
        2,
        2,
    )  # 88 of class 0, 2 of 1, 10 of 2, none of 3
    shares = pool.sample(3000, evenly=True)[1].argmax(1).bincount(minlength=4) / 3000
    assert shares.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.05)
    assert (pool.sample(3000)[1].argmax(1) == 0).float().mean() > 0.8


def test_the_filter_leaves_out_what_shows_the_trigger_by_itself():
    model, pool = planted(), ImagePool(64, SHAPE, 4)
    pixels = 0.3 + 0.2 * torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(4))
    shows = torch.arange(64) % 4 == 0
    pixels[shows] = square(SIDE, TOP, LEFT)(pixels[shows])
    pool.fill(pixels, model)
    assert (pool.answers.argmax(1) == TARGET)[shows].all()
    left = pool.answers[~shows]
    pool.filter(square(SIDE, TOP, LEFT), TARGET, model)
    assert {tuple(row) for row in pool.answers.tolist()} == {tuple(row) for row in left.tolist()}


def test_a_pool_of_large_images_is_short():
    assert len(ImagePool(4096, (3, 8, 8), 2)) == 4096
    with torch.device("meta"):
        assert len(ImagePool(4096, (3, 512, 512), 2)) == 2**28 // (3 * 512 * 512)


def test_a_full_bank_gives_up_what_acts_no_longer_first():
    bank = TriggerBank(BankSettings(bank_size=3), SHAPE, classes=0)
    for strength in (5.0, 1.0, 3.0):
        bank.take(square(1, int(strength), 0), torch.tensor([int(strength) % 4]), torch.tensor([strength]))
    bank.gain[:] = torch.tensor([0.0, 0.5, 0.5])
    bank.take(square(1, 2, 0), torch.tensor([2]), torch.tensor([0.1]))
    assert sorted(bank.strength.tolist()) == pytest.approx([0.1, 1.0, 3.0])


def test_what_the_untouched_model_takes_for_natural_is_no_trigger():
    """Triggers of a suspected class are kept if they stand out there; where no class is suspected, all are."""
    survey = Survey(anomaly_threshold=3.0, bank=BankSettings(bank_size=8))
    for suspected, kept in ((True, [9.0]), (False, [1.0, 3.0, 9.0])):
        state = SurveyState(survey, planted())
        state.findings.margins[EXCERPTS] = torch.tensor([0.0, 1.0, 20.0, 2.0])  # the middle 1, the deviation 1.48
        state.findings.outliers[EXCERPTS, TARGET] = suspected
        untouched = torch.tensor([1.0, 5.0, 5.9])  # 0, 2.7 and 3.3 deviations
        triggers = Overlay.joined([square(SIDE, row, 0) for row in range(3)])
        survey.keep(state, triggers, torch.full((3,), TARGET), torch.tensor([3.0, 1.0, 9.0]), untouched)
        assert sorted(state.bank.strength[: len(state.bank)].tolist()) == kept
