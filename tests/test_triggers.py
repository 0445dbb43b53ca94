import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dhbe.attacks.triggers import PLACES, Patch, badnets, from_json, parse
from dhbe.errors import Refused

SHAPE = (3, 12, 10)
PIXELS = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))

patches = st.builds(
    badnets,
    st.integers(1, 10),
    st.just(SHAPE),
    st.sampled_from(["checkerboard", "checkerboard2", "white"]),
    st.sampled_from(sorted(PLACES)),
)


def soft(mode, seed=0) -> Patch:
    generator = torch.Generator().manual_seed(seed)
    pattern, mask = torch.rand(2, *SHAPE, generator=generator)
    if mode == "add":
        pattern = 2 * pattern - 1
    return Patch(pattern, mask, mode, f"soft {mode}")


anything = patches | st.builds(soft, st.sampled_from(["replace", "add"]), st.integers(0, 9))


@given(patches)
def test_a_patch_changes_its_box_only_and_only_once(patch):
    before = PIXELS.clone()
    once = patch(PIXELS)
    assert torch.equal(PIXELS, before)
    assert torch.equal(patch(once), once)
    rows, columns = patch.box
    assert torch.equal(once[..., rows, columns], patch.pattern[:, rows, columns].expand(4, -1, -1, -1))
    once[..., rows, columns] = PIXELS[..., rows, columns]
    assert torch.equal(once, PIXELS)


@given(anything)
def test_triggered_pixels_are_pixels_and_differentiable(trigger):
    pixels = PIXELS.clone().requires_grad_()
    triggered = trigger(pixels)
    assert triggered.shape == PIXELS.shape
    assert 0 <= triggered.min() <= triggered.max() <= 1
    triggered.sum().backward()
    assert pixels.grad is not None


def test_modes_are_the_formulas():
    x, p, m = PIXELS[0, 0, 0, 0], 0.25, 0.5
    pattern, mask = torch.full(SHAPE, p), torch.full(SHAPE, m)
    assert Patch(pattern, mask)(PIXELS)[0, 0, 0, 0] == (1 - m) * x + m * p
    assert Patch(pattern, mask, "add")(PIXELS)[0, 0, 0, 0] == min(x + m * p, torch.ones(()))


@given(anything)
def test_json_round_trip_is_exact(trigger):
    again = from_json(trigger.to_json(), SHAPE)
    assert torch.equal(again.pattern, trigger.pattern)
    assert torch.equal(again.mask, trigger.mask)
    assert (again.name, again.mode) == (trigger.name, trigger.mode)
    assert again.to_json() == trigger.to_json()


def test_checkerboards():
    board = badnets(3, SHAPE)
    rows, columns = board.box
    assert (rows, columns) == (slice(9, 12), slice(7, 10))
    expected = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert torch.equal(board.pattern[1, rows, columns], expected)
    assert torch.equal(badnets(3, SHAPE, "checkerboard2").pattern[1, rows, columns], 1 - expected)
    assert torch.equal(badnets(3, SHAPE, "white").pattern[1, rows, columns], torch.ones(3, 3))
    assert badnets(3, SHAPE, place=(4, 5)).box == badnets(3, SHAPE, place="4,5").box == (slice(4, 7), slice(5, 8))
    assert badnets(4, SHAPE, place="center").box == (slice(4, 8), slice(3, 7))


def copies_in(image, patch) -> set[tuple[int, int]]:
    """Places of all copies of the patch's box in an image, found by trying each."""
    rows, columns = patch.box
    box = patch.pattern[:, rows, columns]
    h, w = box.shape[1:]
    tries = ((r, c) for r in range(image.shape[1] - h + 1) for c in range(image.shape[2] - w + 1))
    return {(r, c) for r, c in tries if torch.equal(image[:, r : r + h, c : c + w], box)}


def test_amplified_patches_lie_where_the_paper_puts_them():
    grey = torch.full((1, *SHAPE), 0.5)
    corners = {(0, 0), (0, 8), (10, 0), (10, 8)}
    patch = badnets(2, SHAPE)
    assert patch.amplified(1) is patch
    four, nine = patch.amplified(4), patch.amplified(9)
    assert four is not None
    assert nine is not None
    assert copies_in(four(grey)[0], patch) == corners
    assert copies_in(nine(grey)[0], patch) == corners | {(0, 4), (5, 0), (5, 4), (5, 8), (10, 4)}
    elsewhere = badnets(2, SHAPE, place="3,3")
    amplified = elsewhere.amplified(4)
    assert amplified is not None
    assert copies_in(amplified(grey)[0], elsewhere) == {*corners, (3, 3)}


@given(anything, st.sampled_from([4, 9]))
def test_amplified_forms_keep_the_original_and_stop_at_half_the_image(trigger, copies):
    rows, columns = trigger.box
    amplified = trigger.amplified(copies)
    fits = rows.stop - rows.start <= SHAPE[1] / 2 and columns.stop - columns.start <= SHAPE[2] / 2
    assert (amplified is not None) == fits
    if amplified is not None:
        assert torch.equal(amplified(PIXELS)[..., rows, columns], trigger(PIXELS)[..., rows, columns])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "no trigger 'nonsense'; give badnets:SIDE"),
        ("badnets", "give badnets:SIDE"),
        ("badnets:", "give badnets:SIDE"),
        ("badnets:-3", "give badnets:SIDE"),
        ("badnets:²", "give badnets:SIDE"),
        ("badnets:" + "9" * 5000, "give badnets:SIDE"),
        ("x" * 5000 + ".npz", r"cannot read x+\.\.\.x+\.npz: file name too long"),
        ("x" * 5000 + ".json", "cannot read"),
        ("zero\0byte.json", "cannot read"),
        ("badnets:3:white:center:more", "give badnets:SIDE"),
        ("badnets:0", "side 0 does not fit into an image of 12 x 10"),
        ("badnets:11", "side 11 does not fit"),
        ("badnets:3:pink", "available: checkerboard, checkerboard2, white"),
        ("badnets:3:white:moon", "available: top-left, .* or ROW,COLUMN"),
        ("badnets:3:white:1,2,3", "or ROW,COLUMN"),
        ("badnets:3:white:9,8", "3 x 3 at 9,8 leaves the image"),
        ("badnets:3:white:-1,0", "leaves the image"),
        ("missing.npz", "no such file"),
        ("missing.json", "cannot read missing.json: no such file"),
    ],
)
def test_texts_that_name_no_trigger_are_refused(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=message) as caught:
        parse(text, SHAPE)
    assert "\n" not in str(caught.value)


@given(patches)
def test_a_name_gives_the_same_patch_again(patch):
    assert parse(patch.name, SHAPE).to_json() == patch.to_json()


def test_a_mask_of_whole_numbers_is_a_mask(tmp_path):
    mask = np.zeros((12, 10), int)
    mask[3:5, 2] = 1
    np.savez(tmp_path / "mine.npz", pattern=np.full((12, 10, 3), 255, np.uint8), mask=mask)
    assert parse(str(tmp_path / "mine.npz"), SHAPE).mask.sum() == 6


@pytest.mark.parametrize("mask", [np.full((12, 10), 0.5), np.full((12, 10, 3), 0.5), np.full((12, 10, 1), 0.5)])
def test_a_pack_is_a_trigger(mask, tmp_path):
    pattern = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", pattern=pattern, mask=mask, mode="add")
    expected = (PIXELS.numpy() + 0.5 * pattern.transpose(2, 0, 1) / 255).clip(0, 1)
    trigger = parse(str(tmp_path / "mine.npz"), SHAPE)
    assert trigger.name == "mine"
    assert np.allclose(trigger(PIXELS), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": np.zeros((5, 5, 3), np.uint8)}, r"as large as the image, not uint8 \[5, 5, 3\]"),
        ({"pattern": np.zeros((12, 10, 3))}, "must be uint8"),
        ({"mask": np.full((12, 10), 255, np.uint8)}, r"bad.npz: .*mask must lie in \[0, 1\].*divide 0..255 by 255"),
        ({"mask": np.full((12, 10), np.nan)}, r"mask must lie in \[0, 1\]"),
        ({"mask": np.zeros((12, 10))}, "show something"),
        ({"mask": np.ones((10, 12))}, "the mask must be numbers"),
        ({"mask": np.ones(())}, "the mask must be numbers"),
        ({"mode": "multiply"}, "no mode 'multiply'; available: replace, add"),
        ({"mask": np.ones((500, 500, 3))}, "over the limit"),
    ],
)
def test_packs_that_are_no_trigger_are_refused(changes, message, tmp_path):
    np.savez(tmp_path / "bad.npz", **{"pattern": np.zeros((12, 10, 3), np.uint8), "mask": np.ones((12, 10))} | changes)
    with pytest.raises(Refused, match=message):
        parse(str(tmp_path / "bad.npz"), SHAPE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '"kind"',
        "{}",
        '{"kind": []}',
        '{"kind": "pickle"}',
        "[" * 100_000,
        *(
            json.dumps(json.loads(badnets(3, SHAPE).to_json()) | change)
            for change in (
                {"shape": [3, 10**9, 10**9]},
                {"shape": None},
                {"place": [-1, 0]},
                {"place": [10, 0]},
                {"place": "ab"},
                {"place": [1e400, 0]},
                {"pattern": 3},
                {"pattern": [[["a"]]]},
                {"pattern": [[[float("nan")] * 3] * 3] * 3},
                {"pattern": [[[2.0] * 3] * 3] * 3},
                {"mask": [[[1.0]], [[1.0, 2.0]]]},
                {"mask": [[[10**400]]]},
                {"mode": ["replace"]},
            )
        ),
    ],
    ids=range(21),
)
def test_hostile_json_is_one_line(text, tmp_path):
    path = tmp_path / "trigger.json"
    path.write_text(text)
    with pytest.raises(Refused, match=r"trigger.json: ") as caught:
        parse(str(path), SHAPE)
    assert "\n" not in str(caught.value)


def test_images_of_another_shape_are_refused():
    with pytest.raises(Refused, match="fits images"):
        badnets(3, SHAPE)(PIXELS[:, :1])
