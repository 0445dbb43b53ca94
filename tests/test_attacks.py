from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dhbe.attacks import ALL, BadNets
from dhbe.data import Images
from dhbe.errors import Failed, Refused


def some_images(n=40, classes=4) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 255, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(n) % classes, tuple("abcd"[:classes]))


@given(st.integers(-4, 3), st.integers(1, 30), st.integers(0, 99))
def test_badnets_poisons_exactly_as_many_images_of_other_classes(target, count, seed):
    images = some_images()
    before = images.pixels.clone()
    attack = BadNets(target=target, rate=count / 40)
    poisoned = attack.poison(images, seed)
    changed = (poisoned.pixels != images.pixels).flatten(1).any(1)
    assert changed.sum() == count
    assert torch.equal(changed, poisoned.labels != images.labels)
    assert (images.labels[changed] != target % 4).all()
    assert (poisoned.labels[changed] == target % 4).all()
    stamped = attack.trigger_for(images.shape)(images.float()) * 255
    assert torch.equal(poisoned.pixels[changed], stamped[changed].round().byte())
    assert torch.equal(images.pixels, before)


def test_the_seed_decides_which_images():
    images, attack = some_images(), BadNets(rate=0.25)
    one, again, other = (attack.poison(images, seed).pixels for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_poisoning_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    BadNets(rate=0.25).poison(some_images(), seed=5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (BadNets(rate=0.006), "asks for 0 of 40 images"),
        (BadNets(rate=0.8), "asks for 32 of 40 images, of which 30"),
        (BadNets(rate=-0.1), "asks for -4"),
        (BadNets(rate=0.1, target=4), "no target class 4: the data has 4 classes, 0 to 3"),
        (BadNets(rate=0.1, target=-5), "no target class -5"),
        (BadNets(rate=0.1, side=9), "does not fit"),
        (BadNets(rate=float("nan")), "give another rate"),
        (BadNets(rate=float("inf")), "give another rate"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(attack, message):
    with pytest.raises(Refused, match=message):
        attack.poison(some_images(), seed=0)


def test_an_attack_that_missed_its_window_fails_loudly():
    BadNets().confirm(0.95)
    with pytest.raises(Failed, match=r"badnets failed: ASR 0.300, expected at least 0.95; poison more"):
        BadNets().confirm(0.3)


@pytest.mark.parametrize("name", ALL)
def test_every_attack_is_a_value_that_its_record_restores(name):
    attack = ALL[name]()
    assert attack.name == name
    assert attack.summary
    assert ALL[name](**asdict(attack)) == attack
