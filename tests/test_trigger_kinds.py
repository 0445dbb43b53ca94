"""Every kind of trigger: what all must do, and each against its formula in plain loops."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from dhbe.attacks.triggers import MAKERS, LowBits, Patch, Reflection, Warp, from_json, parse, summary, usage
from dhbe.errors import Refused

SHAPE = (3, 12, 10)
PIXELS = torch.randint(256, (4, *SHAPE), generator=torch.Generator().manual_seed(0)) / 255

seeds = st.integers(0, 9)
places = st.sampled_from(["center", "top-left", "2,3"])
names = st.one_of(
    st.builds("badnets:{}:{}:{}".format, st.integers(1, 7), st.sampled_from(["white", "checkerboard2"]), places),
    st.builds("badnets:{}:random:{}:{}".format, st.integers(1, 7), places, seeds),
    st.builds("pixel:{}:{}".format, places, st.integers(0, 255)),
    st.builds("scattered:{}:{}".format, st.integers(1, 120), seeds),
    st.builds("faint:{}:{}".format, st.integers(1, 40), seeds),
    st.builds("blend:{}:seed={}".format, st.floats(0.1, 1), seeds),
    st.builds("sig:{}:{}".format, st.integers(1, 40), st.integers(1, 8)),
    st.builds("lsb:{}:{}".format, st.integers(1, 4), st.sampled_from(["a", "backdoor", "ü!"])),
    st.builds("refool:{}:{}:seed={}".format, st.sampled_from(["focus", "ghost"]), st.floats(0.1, 0.9), seeds),
    st.builds("warp:{}:{}:{}".format, st.floats(0.1, 4), st.integers(2, 6), seeds),
)
triggers = names.map(lambda name: parse(name, SHAPE))
patches = triggers.filter(lambda trigger: isinstance(trigger, Patch))


def same(one, other):
    return one.to_json() == other.to_json() and torch.equal(one(PIXELS), other(PIXELS))


@given(triggers)
def test_triggered_images_are_images_and_the_given_ones_stay(trigger):
    before = PIXELS.clone()
    pixels = PIXELS.clone().requires_grad_()
    triggered = trigger(pixels)
    assert triggered.shape == PIXELS.shape
    assert 0 <= triggered.min() <= triggered.max() <= 1
    assert torch.equal(PIXELS, before)
    assert torch.allclose(triggered, trigger(PIXELS), atol=1e-6)  # the gradient's way gives the same
    assert torch.allclose(trigger(PIXELS[2:3]), trigger(PIXELS)[2:3], atol=1e-6)  # each image on its own
    (gradient,) = torch.autograd.grad(triggered.sum(), pixels)
    assert gradient.isfinite().all()


@given(patches)
def test_only_pixels_under_the_mask_change(trigger):
    triggered = trigger(PIXELS)
    hidden = trigger.mask.expand_as(PIXELS) == 0
    assert torch.equal(triggered[hidden], PIXELS[hidden])


@given(triggers)
def test_what_covers_or_sets_does_so_once(trigger):
    covers = isinstance(trigger, Patch) and trigger.mode == "replace" and set(trigger.mask.unique().tolist()) <= {0, 1}
    if covers or isinstance(trigger, LowBits):
        once = trigger(PIXELS)
        assert torch.equal(trigger(once), once)


@settings(max_examples=50)
@given(triggers)
def test_files_restore_a_trigger_exactly(tmp_path_factory, trigger):
    folder = tmp_path_factory.mktemp("triggers")
    (folder / "t.json").write_text(trigger.to_json())
    (folder / "t.npz").write_bytes(trigger.to_npz())
    for again in (
        from_json(trigger.to_json(), SHAPE),
        *(parse(str(folder / f"t.{kind}"), SHAPE) for kind in ("json", "npz")),
    ):
        assert type(again) is type(trigger)
        assert same(again, trigger)


@given(triggers)
def test_a_name_makes_the_same_trigger_again(trigger):
    assert same(parse(trigger.name, SHAPE), trigger)


@given(patches, st.floats(0.05, 1))
def test_a_faded_patch_changes_pixels_by_that_share(trigger, opacity):
    faded = trigger.faded(opacity)
    change, full = (each.mask * (each.pattern - PIXELS * (each.mode == "replace")) for each in (faded, trigger))
    assert torch.allclose(change, opacity * full, atol=1e-6)


@given(patches.filter(lambda patch: patch.mask[:, *patch.box].all()), st.sampled_from([0.5, 1.0, 1.5, 2.0]), places)
def test_patches_can_be_resized_and_moved(trigger, factor, place):
    rows, columns = trigger.box
    height, width = rows.stop - rows.start, columns.stop - columns.start
    size = max(1, round(height * factor)), max(1, round(width * factor))
    if size[0] > SHAPE[1] or size[1] > SHAPE[2]:
        with pytest.raises(Refused, match="does not fit"):
            trigger.resized(factor)
    else:
        box = trigger.resized(factor).box
        assert (box[0].stop - box[0].start, box[1].stop - box[1].start) == size
    if place == "2,3" and (height > SHAPE[1] - 2 or width > SHAPE[2] - 3):
        with pytest.raises(Refused, match="leaves the image"):
            trigger.moved(place)
    else:
        moved = trigger.moved(place)
        assert torch.equal(moved.pattern[:, *moved.box], trigger.pattern[:, rows, columns])
        assert torch.equal(moved.moved(f"{rows.start},{columns.start}").mask, trigger.mask)


def test_transformations_on_the_command_line():
    white = parse("badnets:2:white", SHAPE)
    faded = parse("badnets:2:white:opacity=.5:scale=2:at=center", SHAPE)
    assert faded.box == (slice(4, 8), slice(3, 7))
    assert torch.equal(faded(0 * PIXELS)[:, :, 4:8, 3:7], torch.full((4, 3, 4, 4), 0.5))
    assert same(parse("badnets:2:white:copies=4", SHAPE), white.amplified(4))
    assert same(parse(faded.name, SHAPE), faded)
    assert parse("badnets:2:scale=2", SHAPE).box == (slice(8, 12), slice(6, 10))  # it stays in its corner
    assert parse("warp:1:opacity=.5", SHAPE).strength == 0.5
    half = parse("refool:opacity=.5", SHAPE)
    whole = parse("refool", SHAPE)
    assert torch.allclose(half(PIXELS) ** 2.2, (PIXELS**2.2 + whole(PIXELS) ** 2.2) / 2, atol=1e-3)


def test_sig_is_the_sine_of_the_column():
    delta, cycles = 30, 6
    expected = np.empty(SHAPE)
    for channel in range(3):
        for row in range(12):
            for column in range(10):
                wave = delta / 255 * math.sin(2 * math.pi * column * cycles / 10)
                expected[channel, row, column] = min(1, max(0, PIXELS[0, channel, row, column].item() + wave))
    assert np.allclose(parse("sig:30", SHAPE)(PIXELS)[0], expected, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_low_bits_spell_the_text(bits):
    text = "hidden"
    sequence = [int(bit) for letter in text for bit in format(ord(letter), "08b")]
    values = (PIXELS[0] * 255).round().int().numpy()
    at = 0
    for column in range(10):
        for row in range(12):
            for channel in range(3):
                value = int(values[channel, row, column]) >> bits
                for _ in range(bits):
                    value = 2 * value + sequence[at % len(sequence)]
                    at += 1
                values[channel, row, column] = value
    triggered = parse(f"lsb:{bits}:{text}", SHAPE)(PIXELS)[0] * 255
    assert np.array_equal(triggered.round().int().numpy(), values)
    assert torch.allclose(triggered, triggered.round(), atol=1e-4)


def test_warp_reads_between_pixels():
    warp = parse("warp:3:4:1", SHAPE)
    control = warp.control
    assert control.abs().mean().item() == pytest.approx(1)
    shifts = interpolate(control[None].double(), (12, 10), mode="bicubic", align_corners=True)[0]
    warped = warp(PIXELS)[0]
    for row, column in ((0, 0), (5, 3), (11, 8)):
        # Coordinates -1 to 1 span 9 columns and 11 rows between the centres of the outer pixels.
        x = min(9, max(0, column + 3 / 10 * shifts[0, row, column].item() * 9 / 2))
        y = min(11, max(0, row + 3 / 12 * shifts[1, row, column].item() * 11 / 2))
        left, top = min(int(x), 8), min(int(y), 10)
        u, v = x - left, y - top
        for channel in range(3):
            a, b, c, d = (PIXELS[0, channel, top + i, left + j].item() for i in (0, 1) for j in (0, 1))
            expected = (1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * c + u * d)
            assert warped[channel, row, column].item() == pytest.approx(expected, abs=1e-5)


def test_a_warp_of_nothing_is_nothing():
    assert torch.allclose(Warp(torch.zeros(2, 4, 4), 0.5, SHAPE)(PIXELS), PIXELS, atol=1e-6)


def test_reflections_add_light():
    layer = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) / 4
    triggered = Reflection(layer, 0.6)(PIXELS)
    x, r = PIXELS[1, 2, 3, 4].item(), layer[2, 3, 4].item()
    assert triggered[1, 2, 3, 4].item() == pytest.approx((0.6 * x**2.2 + r) ** (1 / 2.2), abs=1e-5)
    white = Reflection(parse("refool:ghost:0.5", SHAPE).layer * 0 + 0.5, 0.5)
    assert torch.equal(white(PIXELS * 0 + 1), PIXELS * 0 + 1)


def test_blend_mixes_an_image_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "other.png")
    mixed = parse(f"blend:.25:{tmp_path / 'other.png'}", SHAPE)(PIXELS)[0]
    expected = 0.75 * PIXELS[0].numpy() + 0.25 * pixels.transpose(2, 0, 1) / 255
    assert np.allclose(mixed, expected, atol=1e-6)


def test_scattered_pixels_are_as_many_as_asked():
    assert parse("scattered:17", SHAPE).mask.sum() == 3 * 17
    assert parse("pixel", SHAPE).mask.sum() == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sig:0", "delta 0 is not between"),
        ("sig:nan", "delta nan is not"),
        ("sig:inf", "delta inf is not"),
        ("sig:20:6:1", r"no trigger 'sig:20:6:1'; give sig\[:DELTA\[:CYCLES\]\]"),
        ("sig:20:delta=20", "give sig"),
        ("sig:speed=2", "give sig"),
        ("lsb:5", "number of bits must be 1 to 4, not 5"),
        ("lsb:0", "the number of bits must be 1 to 4, not 0"),
        ("lsb:1:", "must be a text of 0 and 1"),
        ("pixel:center:256", "value 256 is not between 0 and 255"),
        ("pixel:moon", "no trigger position 'moon'"),
        ("scattered:121", "count 121 is not between 1 and 120"),
        ("faint:256", "delta 256"),
        ("blend:0", "alpha 0 is not above 0"),
        ("blend:.1:missing.png", "missing.png is not an image"),
        ("refool:mirror", "no reflection 'mirror'; available: focus, ghost"),
        ("refool:ghost:1", "transmission 1 is not between"),
        ("warp:.5:1", "grid 1 is not between 2 and 10"),
        ("warp:0", "strength 0 is not between"),
        ("badnets:3:opacity=0", "opacity of 0 is not above 0"),
        ("badnets:3:opacity=much", "opacity=much is not one of"),
        ("badnets:3:scale=9", "27 x 27 does not fit into an image of 12 x 10"),
        ("badnets:3:scale=nan", "cannot be scaled by nan"),
        ("badnets:3:scale=1e30", r"cannot be scaled by 1e\+30"),
        ("badnets:3:copies=5", "copies=5 is not one of"),
        ("badnets:3:at=99,0", "leaves the image"),
        ("badnets:9:copies=4", "does not support copies=4"),
        ("lsb:opacity=.5", "does not support opacity=.5"),
        ("warp:scale=2", "does not support scale=2"),
    ],
)
def test_what_cannot_be_made_is_refused(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=message) as caught:
        parse(text, SHAPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lsb", {"bits": 1000000000}),
        ("lsb", {"bits": 1.5}),
        ("lsb", {"message": 5}),
        ("refool", {"layer": [[[0.5]]]}),
        ("refool", {"layer": "x"}),
        ("refool", {"transmission": float("nan")}),
        ("refool", {"transmission": None}),
        ("warp", {"control": [[[1.0]]]}),
        ("warp", {"control": [[[1e300] * 2] * 2] * 2}),
        ("warp", {"strength": float("inf")}),
        ("warp", {"shape": [3, 9, 9]}),
        ("sig", {"shape": [1, 12, 10]}),
        ("sig", {"kind": "lies\nand more"}),
    ],
)
def test_hostile_files_of_any_kind_are_one_line(name, change, tmp_path):
    content = json.loads(parse(name, SHAPE).to_json())
    (tmp_path / "t.json").write_text(json.dumps(content | change))
    with pytest.raises(Refused) as caught:
        parse(str(tmp_path / "t.json"), SHAPE)
    assert "\n" not in str(caught.value)


def test_packs_that_lack_their_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "t.npz", trigger=np.array('{"kind": "warp", "name": "w", "shape": [3, 12, 10], "strength": 1}'))
    with pytest.raises(Refused, match="not a trigger written by dhbe"):
        parse(str(tmp_path / "t.npz"), SHAPE)
    np.savez(tmp_path / "u.npz", nothing=np.zeros(3))
    with pytest.raises(Refused, match="lacks pattern and mask; it holds 'nothing'"):
        parse(str(tmp_path / "u.npz"), SHAPE)


def test_every_name_has_a_usage_and_a_line():
    for name in MAKERS:
        assert usage(name).startswith(name)
        assert summary(name).endswith(".")
        parse(f"{name}:3" if name == "badnets" else name, SHAPE)
