"""What all attacks must do, on images so small that nothing has to be learned; and what each promises."""

from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dhbe import networks
from dhbe.attacks import ALL, Workshop
from dhbe.attacks.badnets import BadNets
from dhbe.attacks.clean_label import CleanLabel
from dhbe.attacks.pgd import pgd
from dhbe.attacks.trojaning import Trojaning
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.errors import Failed, Refused
from dhbe.training import Fit

SHAPE, CLASSES, COUNT = (3, 8, 8), 4, 48

TINY = {
    "badnets": {"rate": 0.25},
    "clean-label": {"rate": 0.125, "steps": 2, "proxy_epochs": 1, "side": 3},
    "trojaning": {"rate": 0.25, "steps": 3, "tune_epochs": 1, "channels": 4},
    "sig": {"share": 0.5},
    "blend": {"rate": 0.25},
    "lsb": {"rate": 0.25},
    "refool": {"share": 0.5},
    "wanet": {"rate": 0.25, "noise_rate": 0.25, "strength": 3.0},
    "none": {},
}
"""The least that each attack can do."""

CHANGED = {"none": 0, "clean-label": 6, "sig": 6, "refool": 6, "wanet": 24}
"""Images that it says it changes; 12 for the others."""
KEEP_LABELS = {"clean-label", "sig", "refool", "none"}


def some_images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (COUNT, *SHAPE), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(COUNT) % CLASSES, tuple("abcd"))


def fresh():
    return Classifier(networks.build("resnet8", CLASSES, SHAPE), shape=SHAPE, classes=CLASSES)


@cache
def trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fresh().eval()


class Spy(Workshop):
    """Trains for one epoch, and remembers what it was given."""

    def train(self, images, classifier=None, **more):
        self.__dict__.setdefault("seen", []).append(images)
        return super().train(images, classifier, **more)


def planted(name, seed=0, **changes):
    attack = ALL[name](**TINY[name] | changes)
    shop = Spy(Fit(epochs=1, batch=16, crop=1), fresh, seed, trained() if name == "trojaning" else None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = attack.plant(some_images(), shop)
    return attack, made, shop.__dict__["seen"][-1]


def test_every_attack_is_tried():
    assert list(TINY) == list(ALL)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("target", [-1, 1])
def test_exactly_the_stated_images_change(name, target):
    images = some_images()
    _, made, training = planted(name, target=target)
    changed = (training.pixels != images.pixels).flatten(1).any(1)
    assert torch.equal(changed.nonzero().flatten(), made.chosen.sort().values)
    assert len(made.chosen) == CHANGED.get(name, 12)
    relabelled = training.labels != images.labels
    if name in KEEP_LABELS:
        assert not relabelled.any()
        assert (images.labels[changed] == target % CLASSES).all()
    else:
        assert not relabelled[~changed].any()
        assert relabelled.sum() == 12
        assert (training.labels[relabelled] == target % CLASSES).all()
    assert (training.names, len(training)) == (images.names, COUNT)
    if made.trigger is not None and name not in ("clean-label", "wanet"):
        triggered = (made.trigger(images.float(made.chosen)) * 255).round().byte()
        assert torch.equal(training.pixels[made.chosen], triggered)


@pytest.mark.parametrize("name", ALL)
def test_the_seed_repeats_everything_and_the_given_images_stay(name):
    _, one, training = planted(name, seed=3)
    _, again, training_again = planted(name, seed=3)
    assert torch.equal(training.pixels, training_again.pixels)
    assert torch.equal(one.chosen, again.chosen)
    for a, b in zip(one.classifier.parameters(), again.classifier.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not one.classifier.training
    if name != "none":
        assert one.trigger.to_json() == again.trigger.to_json()
        assert not torch.equal(one.chosen, planted(name, seed=4)[1].chosen)


@pytest.mark.parametrize("name", ALL)
def test_images_and_the_clean_classifier_are_left_as_they_are(name):
    images, before = some_images(), {key: value.clone() for key, value in trained().state_dict().items()}
    shop = Workshop(Fit(epochs=1, batch=16, crop=1), fresh, 0, trained())
    copy = replace(images, pixels=images.pixels.clone(), labels=images.labels.clone())
    ALL[name](**TINY[name]).plant(images, shop)
    assert torch.equal(images.pixels, copy.pixels)
    assert torch.equal(images.labels, copy.labels)
    assert all(torch.equal(value, before[key]) for key, value in trained().state_dict().items())


@pytest.mark.parametrize("name", ALL)
def test_epochs_are_foretold(name):
    seen = []
    for clean in (None, trained()):
        seen.clear()
        shop = Workshop(Fit(epochs=2, batch=16, crop=1), fresh, 0, clean, seen.append)
        attack = ALL[name](**TINY[name])
        attack.plant(some_images(), shop)
        assert len(seen) == sum(fit.epochs for fit, _ in attack.trainings(shop.fit, clean=clean is not None))


@pytest.mark.parametrize("name", ALL)
def test_every_attack_is_plain_json_and_has_a_window(name):
    attack = ALL[name]()
    assert ALL[name](**asdict(attack)) == attack
    assert 0 < attack.min_asr <= 1
    assert 0 < attack.max_drop < 1
    if name == "none":
        return
    attack.confirm(attack.min_asr, 0.9, 0.9 + attack.max_drop / 2)
    with pytest.raises(Failed, match=f"attack {name} failed: ASR 0.100, expected at least"):
        attack.confirm(0.1)
    with pytest.raises(Failed, match="failed: ASR undefined, as no image is classified correctly"):
        attack.confirm(None)
    with pytest.raises(Failed, match=r"failed: ACC 0.800 is more than 0.02 below the clean model's 0.900"):
        attack.confirm(1.0, 0.8, 0.9)


@pytest.mark.parametrize("name", [name for name in ALL if name != "none"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"target": 4}, "no target class 4"), ({"target": -5}, "no target class -5")],
)
def test_a_target_out_of_range_is_refused(name, changes, message):
    with pytest.raises(Refused, match=message):
        planted(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("clean-label", {"rate": 0.5}, "asks for 24 of 48 images, of which 12 lie in the target class 3"),
        ("clean-label", {"side": 9}, "does not fit"),
        ("sig", {"share": 1.5}, "asks for 18 of 12 images"),
        ("sig", {"delta": 0.0}, "delta 0 is not between"),
        ("refool", {"share": 0.0}, "asks for 0 of 12"),
        ("refool", {"style": "mirror"}, "no reflection 'mirror'"),
        ("refool", {"image": "missing.png"}, "missing.png is not an image"),
        ("blend", {"alpha": 1.5}, "alpha 1.5 is not"),
        ("blend", {"rate": 0.9}, "of which 36 lie outside the target class 3"),
        ("lsb", {"bits": 9}, "number of bits must be 1 to 4, not 9"),
        ("wanet", {"grid": 99}, "grid 99 is not between"),
        ("wanet", {"noise_rate": 0.9}, "of which 36 are not poisoned"),
        ("trojaning", {"side": 9}, "does not fit"),
        ("trojaning", {"stage": "layer9"}, "no stage 'layer9' in the network; available: conv1, bn1, maxpool, layer1"),
        ("trojaning", {"steps": 0}, "both must be at least 1"),
        ("badnets", {"goal": "all"}, "no goal 'all'; available: all-to-one"),
        ("badnets", {"goal": "one-to-one", "source": 3}, "the source class 3 is the target"),
        ("badnets", {"goal": "one-to-one", "source": 4}, "no source class 4"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(name, changes, message):
    with pytest.raises(Refused, match=message):
        planted(name, **changes)


@given(st.integers(0, 3), st.integers(1, 3))
@settings(max_examples=10)
def test_one_to_one_changes_the_source_class_only(source, away):
    attack = BadNets(goal="one-to-one", source=source, target=(source + away) % 4, rate=1 / 8)
    images = some_images()
    chosen = attack.choose(images, 0)
    assert len(chosen) == 6
    assert (images.labels[chosen] == source).all()
    assert (attack.poison(images, 0).labels[chosen] == (source + away) % 4).all()


def test_all_to_all_moves_every_class_on():
    images, attack = some_images(), BadNets(goal="all-to-all", rate=0.5)
    chosen = attack.choose(images, 0)
    assert set(images.labels[chosen].tolist()) == {0, 1, 2, 3}
    assert torch.equal(attack.poison(images, 0).labels[chosen], (images.labels[chosen] + 1) % 4)
    _, made, _ = planted("badnets", goal="all-to-all")
    assert (made.target, made.source) == ("next", None)
    _, made, _ = planted("badnets", goal="one-to-one", source=-3)
    assert (made.target, made.source) == (3, 1)


@settings(max_examples=20)
@given(st.floats(0.001, 0.5), st.floats(0.001, 0.5), st.integers(0, 4))
def test_pgd_stays_in_its_ball_and_among_images(epsilon, step, steps):
    pixels, labels = some_images().float(slice(8)), some_images().labels[:8]
    found = pgd(trained(), pixels, labels, epsilon=epsilon, step=step, steps=steps)
    assert (found - pixels).abs().max() <= epsilon + 1e-6
    assert 0 <= found.min() <= found.max() <= 1
    assert not found.requires_grad


def test_pgd_raises_the_loss():
    pixels, labels = some_images().float(), some_images().labels
    cost = torch.nn.functional.cross_entropy
    found = pgd(trained(), pixels, labels, epsilon=0.1, step=0.03, steps=10)
    random = (pixels + 0.1 * torch.rand_like(pixels).mul(2).sub(1)).clamp(0, 1)
    with torch.no_grad():
        losses = [cost(trained()(each), labels) for each in (pixels, random, found)]
    assert losses[2] > max(losses[:2]) + 0.05


def test_clean_label_changes_stay_in_the_ball_but_for_the_patch():
    attack, made, training = planted("clean-label")
    changes = (training.float(made.chosen) - some_images().float(made.chosen)).abs()
    hidden = made.trigger.mask.expand_as(changes) == 0
    assert changes[hidden].max() <= attack.epsilon / 255 + 0.5 / 255
    assert changes[hidden].mean() > 0.25 * attack.epsilon / 255


def test_trojaning_tunes_only_what_comes_after_the_stage():
    _, made, _ = planted("trojaning", stage="layer2")
    before, after = made.clean.network.state_dict(), made.classifier.network.state_dict()
    same = {key for key in before if torch.equal(before[key], after[key])}
    early = {key for key in before if key.startswith(("conv1", "bn1", "layer1", "layer2"))}
    assert same == early | {key for key in same if key.endswith("num_batches_tracked")}
    assert early < set(before)


def test_trojaning_excites_its_channels():
    attack = Trojaning(side=4, steps=60, rate=0.25, tune_epochs=1, channels=4)
    made = attack.plant(some_images(), Workshop(Fit(epochs=1, batch=16, crop=0), fresh, 0, trained()))
    pixels, network = some_images().float(), trained().network

    @torch.no_grad()
    def response(shown):
        """The largest activation of each channel of the stage, on average over images."""
        seen = []
        hook = network.layer2.register_forward_hook(lambda _, __, output: seen.append(output))
        trained()(shown)
        hook.remove()
        return seen[0].flatten(2).amax(2).mean(0)

    noise = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    plain = response(torch.where(made.trigger.mask > 0, noise, pixels))
    assert (response(made.trigger(pixels)) / plain.clamp_min(0.1)).topk(4).values.min() > 1.2


def test_a_proxy_is_trained_on_what_fools_it():
    batches = []

    def perturb(pixels, labels):
        batches.append((len(pixels), labels.dtype))
        return 1 - pixels

    torch.manual_seed(0)
    classifier = fresh()
    Fit(epochs=1, batch=16, crop=0, flip=False)(classifier, some_images(), perturb=perturb)
    torch.manual_seed(0)
    other = fresh()
    inverted = replace(some_images(), pixels=255 - some_images().pixels)
    Fit(epochs=1, batch=16, crop=0, flip=False)(other, inverted)
    assert batches == [(16, torch.int64)] * 3
    for one, two in zip(classifier.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_only_tuned_parts_are_trained():
    classifier = fresh()
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    network = classifier.network
    Fit(epochs=1, batch=16, crop=0)(classifier, some_images(), tuned=[network.layer3, network.fc])
    changed = {key for key, value in classifier.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.startswith(("network.layer3", "network.fc")) for key in changed)
    assert all(parameter.requires_grad for parameter in classifier.parameters())


def test_a_proxy_makes_the_epochs_longer():
    assert [fit.epochs for fit, _ in CleanLabel(proxy_epochs=7).trainings(Fit(epochs=3), clean=True)] == [7, 3]
    assert [fit.epochs for fit, _ in Trojaning(tune_epochs=2).trainings(Fit(epochs=3), clean=False)] == [3, 2]
