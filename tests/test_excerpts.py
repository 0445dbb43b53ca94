"""Squares cut from images deep inside a class: against loops and a planted trigger."""

import torch
from test_search import SHAPE, TARGET, planted

from dhbe.classifier import Classifier
from dhbe.search.excerpts import Excerpting, Scattered, squares
from dhbe.search.families import FAMILIES, Excerpts, Faint, Masked, Overlay
from dhbe.search.image_pool import ImagePool
from dhbe.search.photographs import pieces
from dhbe.search.search import margin
from dhbe.search.survey import Survey


def loop_margins(model: Classifier, triggers: Overlay, label: int, pixels: torch.Tensor) -> list[float]:
    """The mean margin for a class under each trigger, one image at a time."""
    found = []
    for number in range(len(triggers.keep)):
        logits = [model(triggers[[number]](image[None]))[0].tolist() for image in pixels]
        found.append(sum(row[label] - max(x for j, x in enumerate(row) if j != label) for row in logits) / len(pixels))
    return found


def test_deep_images_hold_the_trigger_and_a_square_of_them_leads_to_the_class():
    torch.manual_seed(0)
    model, pool = planted(), ImagePool(64, SHAPE, 4)
    pool.fill(pieces(64, SHAPE), model)
    excerpting = Excerpting(
        deep_images=2, deep_steps=60, tried_images=8, hunt_sides=(3, 5), hunt_pieces=2, scattered_steps=5
    )
    deep, reached = excerpting.deepest(model, torch.arange(4))
    assert deep.min() >= 0
    assert deep.max() <= 1
    with torch.no_grad():
        torch.testing.assert_close(reached, margin(model(deep), torch.arange(4)))
    assert reached.argmax() == TARGET
    triggers, margins = excerpting.hunt(model, TARGET, pool, side=4)
    areas = (triggers.keep == 0).sum((1, 2, 3)).tolist()
    assert areas == [9, 9, 16, 16, 25, 25, 16, 16], "squares of three sides, and scattered pixels"
    assert margins.max() > 5
    others = pool.sample(32)[0]
    others = others[model(others).argmax(1) != TARGET]
    best = triggers[[int(margins.argmax())]]
    assert min(loop_margins(model, best, TARGET, others)) > 0


def test_squares_cover_the_image_and_reach_every_edge():
    for side in (1, 5, 16):
        boxes = squares(SHAPE, side)
        assert set(boxes.flatten(1).sum(1).tolist()) == {side**2}
        assert len(boxes.unique(dim=0)) == len(boxes)
        if side > 1:
            assert boxes.amax(0).min() == 1


def test_scattered_triggers_show_so_many_pixels_and_their_masks_learn():
    torch.manual_seed(0)
    family = Scattered(torch.rand(3, *SHAPE), torch.rand(3, 1, 16, 16), 9)
    triggers = family.triggers(torch.arange(3))
    assert (triggers.keep < 0.5).sum((1, 2, 3)).tolist() == [9, 9, 9]
    torch.testing.assert_close(triggers.keep.round(), triggers.keep)
    triggers.add.sum().backward()
    assert family.weights.grad.abs().sum() > 0


def test_where_squares_stand_out_masks_accuse_no_other_class():
    survey, anomaly = Survey(), torch.zeros(len(FAMILIES), 6)
    masked, excerpts, faint = (FAMILIES.index(kind) for kind in (Masked, Excerpts, Faint))
    anomaly[masked, [2, 4]], anomaly[excerpts, 4] = 9.0, 12.0
    outliers = survey.outliers(anomaly)
    assert outliers.nonzero().tolist() == [[masked, 4], [excerpts, 4]]
    anomaly[excerpts, 4] = 0
    assert survey.outliers(anomaly).nonzero().tolist() == [[masked, 2], [masked, 4]]
    anomaly[faint, 1] = 50.0
    assert survey.outliers(anomaly).any(0).tolist() == [False, True, True, False, True, False]
