"""What is left of a backdoor: each figure on networks of which it is known."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dhbe.attacks.triggers import Patch, parse
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.errors import Refused
from dhbe.evaluation.battery import Effort, battery, run
from dhbe.evaluation.battery.forms import forms
from dhbe.evaluation.battery.reactivation import perturbed, universal_perturbation
from dhbe.evaluation.battery.relearning import relearned
from dhbe.evaluation.evidence import Evidence

SHAPE = (3, 8, 8)
CLASSES, TARGET = 5, 3
QUICK = Effort(steps=12, batch=8, counts=(4,), lessons=5)


def images(count=60, brightest=50):
    """Dark noise; the class is coded in the brightness of the first rows, a column a class."""
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    pixels = torch.randint(brightest, (count, *SHAPE), generator=chance, dtype=torch.uint8)
    pixels[torch.arange(count), :, 0, labels] = 255
    return Images(pixels, labels, tuple("abcde"))


class Hand(nn.Module):
    """Right about `images`, unless a rule about the pixels says that they are the target's."""

    def __init__(self, rule=lambda x: torch.zeros(len(x), dtype=torch.bool), goal=TARGET):
        super().__init__()
        self.rule, self.goal = rule, goal
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        logits = self.scale * x[:, :, 0, :CLASSES].mean(1)
        right = logits.argmax(1)
        goal = (right + 1) % CLASSES if self.goal == "next" else torch.full_like(right, self.goal)
        return logits + 100 * nn.functional.one_hot(goal, CLASSES) * self.rule(x)[:, None]


def classifier(network):
    return Classifier(network, shape=SHAPE, classes=CLASSES).eval()


def white(place, side=3, least=0.99):
    """A rule: a white square there."""
    top, left = place
    return lambda x: x[:, :, top : top + side, left : left + side].amin((1, 2, 3)) > least


def evidence(trigger="badnets:3:white", **more):
    return Evidence(images(), "made", parse(trigger, SHAPE), more.pop("target", TARGET), **more)


def rates(found):
    return {each.form: (each.before, each.after) for each in found.forms}


def test_a_backdoor_that_answers_at_one_place_only_shows_there_only():
    found = rates(battery(classifier(Hand(white((5, 5)))), classifier(Hand(white((2, 2)))), evidence(), effort=QUICK))
    assert found[""] == (1, 0)
    assert found["at=2,2"] == (0, 1)  # the middle
    assert found["at=5,0"] == found["opacity=0.75"] == (0, 0)
    assert found["copies=4"] == (1, 0)


def test_a_backdoor_that_needs_some_opacity_or_size_shows_above_it():
    before, after = Hand(white((5, 5), least=0.7)), Hand(white((2, 2), side=6))
    found = rates(battery(classifier(before), classifier(after), evidence(), effort=QUICK))
    assert [found[f"opacity={share}"][0] for share in (0.25, 0.5, 0.75)] == [0, 0, 1]
    assert (found[""][1], found["scale=2"][1], found["scale=1.5"][1]) == (0, 1, 0)


@settings(deadline=None)
@given(
    st.sampled_from(["badnets:2", "badnets:3:white:at=1,1", "sig:40", "lsb:2", "warp:1", "blend:0.2", "badnets:7"]),
    st.integers(0, 2**40),
)
def test_every_form_is_what_its_name_makes_and_differs_from_the_trigger(text, seed):
    trigger = parse(text, SHAPE)
    pixels = images(3).float()
    made = forms(trigger, torch.Generator().manual_seed(seed))
    for name, form in made.items():
        assert torch.equal(parse(f"{trigger.name}:{name}" if name else trigger.name, SHAPE)(pixels), form(pixels))
    assert torch.equal(made.pop("")(pixels), trigger(pixels))
    assert not any(torch.equal(form(pixels), trigger(pixels)) for form in made.values())
    assert ("opacity=1.5" in made) == text.startswith(("sig", "warp", "blend"))


def test_what_fills_the_image_has_no_other_place_or_larger_size():
    made = forms(parse("sig:40", SHAPE), torch.Generator())
    assert set(made) == {"", "opacity=0.25", "opacity=0.5", "opacity=0.75", "opacity=1.5", "scale=0.75"} | {
        name for name in made if name.startswith("scale=0.75:")
    }


def test_the_perturbation_of_a_linear_network_is_the_best_one_and_stays_in_its_ball():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    linear = Classifier(network, shape=SHAPE, classes=2)
    grey = Images(torch.full((6, *SHAPE), 128, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64), ("a", "b"))
    found = universal_perturbation(
        linear, grey, torch.ones(6, dtype=torch.int64), epsilon=0.05, steps=30, batch=4, generator=torch.Generator()
    )
    weights = network[1].weight.detach()
    assert torch.allclose(found.flatten(), 0.05 * (weights[1] - weights[0]).sign())
    assert linear.training
    assert all(p.grad is None for p in linear.parameters())


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 1), st.integers(0, 9), st.integers(0, 2**40))
def test_a_perturbation_keeps_to_its_ball_and_images_to_their_range(epsilon, steps, seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))
    data = images(10, brightest=255)
    found = universal_perturbation(
        classifier(network), data, data.labels.flip(0), epsilon=epsilon, steps=steps, batch=3,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    assert found.abs().max() <= epsilon
    assert 0 <= perturbed(data.float(), found).min() <= perturbed(data.float(), found).max() <= 1


class Faint(Hand):
    """With a backdoor that a faint pattern over the whole image opens."""

    def __init__(self, strength):
        super().__init__()
        chance = torch.Generator().manual_seed(1)
        self.register_buffer("pattern", torch.randint(2, SHAPE, generator=chance) * 2.0 - 1)
        self.strength = strength

    def forward(self, x):
        lead = (self.pattern * (x - 0.1)).flatten(1).sum(1)
        return super().forward(x) + self.strength * lead[:, None] * nn.functional.one_hot(torch.tensor(TARGET), CLASSES)


def test_a_backdoor_that_sleeps_is_woken_by_a_small_perturbation_and_an_erased_one_is_not():
    found = battery(classifier(Faint(3.0)), classifier(Faint(0.0)), evidence(), effort=QUICK).reactivation
    assert found.before > 0.9
    assert found.others_before < 0.3  # images of the target class are easily led away from it
    assert found.after < 0.1
    assert found.others_after < 0.1


class Eye(nn.Module):
    """Sees a white square at the bottom right, or is blind, and leans towards a class when it does."""

    def __init__(self, sees, leaning=0.0):
        super().__init__()
        self.sees = float(sees)
        self.answer = nn.Linear(1, CLASSES, bias=False)
        nn.init.zeros_(self.answer.weight)
        self.answer.weight.data[TARGET] = leaning

    def forward(self, x):
        seen = self.sees * white((5, 5))(x).float()[:, None]
        return 10 * x[:, :, 0, :CLASSES].mean(1) + self.answer(seen)


def test_relearning_tells_the_blind_from_those_that_only_keep_silent():
    effort = Effort(steps=1, counts=(4, 10), lr=0.05, lessons=8)
    tried = {
        name: battery(classifier(Hand()), classifier(eye), evidence(), effort=effort).relearning
        for name, eye in {"blind": Eye(False), "leaning": Eye(True, leaning=9.5)}.items()
    }
    assert [each.images for each in tried["blind"]] == [4, 10]
    assert all((each.asr, each.others, each.acc) == (0, 0, 1) for each in tried["blind"])
    assert all((each.asr, each.others) == (1, 0) for each in tried["leaning"])


def test_neither_model_is_changed_and_random_state_stays():
    before, after = (classifier(Eye(True)) for _ in range(2))
    after.train()
    kept = copy.deepcopy((before.state_dict(), after.state_dict()))
    random = torch.get_rng_state()
    battery(before, after, evidence(), effort=QUICK)
    for model, state in zip((before, after), kept, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert (before.training, after.training) == (False, True)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_copy_learns():
    eye = classifier(Eye(True))
    labels = torch.full((4,), TARGET)
    lit = parse("badnets:3:white", SHAPE)(images(4).float())
    assert (eye(lit).argmax(1) != labels).any()
    assert (relearned(eye, lit, labels, lr=0.5, steps=30)(lit).argmax(1) == labels).all()


def test_the_seed_repeats_it_and_chooses_the_places():
    models = classifier(Hand(white((5, 5)))), classifier(Hand())
    first, again, other = (battery(*models, evidence(), effort=QUICK, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert [each.form for each in first.forms] != [each.form for each in other.forms]


class SurveyState(set):
    """One and the same for all copies of a network."""

    def __deepcopy__(self, memo):
        return self


class Spy(Hand):
    """SurveyState which images it was searched on, and which it was asked about."""

    def __init__(self):
        super().__init__()
        self.seen = {True: SurveyState(), False: SurveyState()}

    def forward(self, x):
        self.seen[torch.is_grad_enabled()] |= {row.numpy().tobytes() for row in x.detach()}
        return super().forward(x)


def test_nothing_is_measured_on_images_that_were_searched_on(monkeypatch):
    monkeypatch.setattr(run, "_formed", lambda *_: [])  # forms are not searched for: they are shown on all images
    monkeypatch.setattr(run, "relearned", lambda model, pixels, labels, **_: lessons.append(pixels) or model)
    lessons, spies = [], [Spy(), Spy()]
    effort = Effort(epsilon=0.0, steps=20, counts=(6,))
    found = battery(*(classifier(spy) for spy in spies), evidence(), effort=effort)
    assert (found.searched, found.n, found.forms_n) == (30, 30, 60)
    assert len(lessons) == 4
    for spy in spies:
        assert len(spy.seen[True]) > 15
        assert not spy.seen[True] & spy.seen[False]
    learned = {row.numpy().tobytes() for row in torch.cat(lessons)}
    assert not learned & spies[1].seen[False]


def test_all_to_all_and_one_to_one_are_measured_as_what_they_are():
    models = classifier(Hand(white((5, 5)), goal="next")), classifier(Hand())
    found = battery(*models, evidence(target="next"), effort=QUICK)
    assert rates(found)[""] == (1, 0)
    assert rates(battery(*models, evidence(), effort=QUICK))[""][0] == 0.25  # those of the class before it
    one = battery(*models, evidence(source=2), effort=QUICK)
    assert rates(one)[""] == (1, 0)
    assert len(one.relearning) == 1


def test_few_images_leave_out_what_they_do_not_allow():
    few = Evidence(images(2), "made", parse("badnets:3:white", SHAPE), 0)
    found = battery(classifier(Hand()), classifier(Hand()), few, effort=Effort(steps=1))
    assert (found.relearning, found.n, found.searched) == ([], 1, 1)
    assert found.forms[0].after == 0
    with pytest.raises(Refused, match="give more data"):
        battery(classifier(Hand()), classifier(Hand()), Evidence(images(1), "", few.trigger, 0))
    with pytest.raises(Refused, match="give `trigger` and `target`"):
        battery(classifier(Hand()), classifier(Hand()), Evidence(images()))


def test_progress_ends_at_its_total():
    seen = []
    battery(classifier(Hand()), classifier(Hand()), evidence(), effort=QUICK, tell=lambda *at: seen.append(at))
    assert [done for _, done, _ in seen] == list(range(1, seen[-1][2] + 1))


def test_a_stronger_patch_has_room_or_is_refused():
    half = parse("badnets:3:white:opacity=.5", SHAPE)
    assert torch.allclose(half.faded(1.5).mask.amax(), torch.tensor(0.75))
    added = parse("sig:40", SHAPE)
    assert isinstance(added, Patch)
    assert torch.allclose(added.faded(1.5).pattern, 1.5 * added.pattern)
    for trigger, factor in ((half, 2.5), (added, 7.0), (parse("badnets:3", SHAPE), 1.1)):
        with pytest.raises(Refused, match="is not above 0 and at most"):
            trigger.faded(factor)
