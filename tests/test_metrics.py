import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score

from dhbe.errors import Refused
from dhbe.evaluation.metrics import accuracy, attack_success, der, goals, per_class, robust_accuracy, wilson

CASES = st.lists(st.tuples(*[st.integers(0, 2)] * 4), min_size=1, max_size=30)


def columns(cases):
    return [torch.tensor(column) for column in zip(*cases, strict=True)]


@given(CASES)
def test_accuracy_agrees_with_scikit_learn(cases):
    predicted, labels, *_ = columns(cases)
    assert accuracy(predicted, labels) == pytest.approx(accuracy_score(labels, predicted))


@given(CASES, st.sampled_from(["model", "victim", "all"]), st.randoms())
def test_attack_success_agrees_with_counting_by_hand(cases, among, shuffler):
    counted = []
    for label, clean, triggered, base in cases:
        right = {"model": clean == label, "victim": base == label, "all": True}[among]
        if label != 1 and right:
            counted.append(triggered == 1)
    shuffled = list(cases)
    shuffler.shuffle(shuffled)
    labels, clean, triggered, base = columns(shuffled)
    if counted:
        assert attack_success(clean, triggered, labels, 1, base, among) == sum(counted) / len(counted)
    else:
        with pytest.raises(Refused, match="no image outside class 1"):
            attack_success(clean, triggered, labels, 1, base, among)


def test_robust_accuracy_leaves_the_target_class_out():
    labels = torch.tensor([0, 1, 2, 2])
    assert robust_accuracy(torch.tensor([1, 1, 2, 1]), labels, target=1) == 1 / 3


@pytest.mark.parametrize(
    ("change", "rating"),
    [
        ((0.9, 0.9, 1.0, 0.0), 1.0),
        ((0.9, 0.9, 1.0, 1.0), 0.5),
        ((0.9, 0.8, 1.0, 0.5), 0.7),
        ((0.8, 0.9, 0.5, 1.0), 0.5),
        ((1.0, 0.0, 0.0, 0.0), 0.0),
    ],
)
def test_der(change, rating):
    assert der(*change) == pytest.approx(rating)


@given(st.integers(1, 10_000), st.floats(0, 1), st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_agrees_with_scipy(total, share, confidence):
    count = round(share * total)
    expected = binomtest(count, total).proportion_ci(confidence, method="wilson")
    assert wilson(count, total, confidence) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_what_cannot_be_counted_is_refused():
    one, two, none = torch.zeros(1).long(), torch.zeros(2).long(), torch.zeros(0).long()
    with pytest.raises(Refused, match="data set is empty"):
        accuracy(none, none)
    with pytest.raises(Refused, match="same length"):
        accuracy(one, two)
    with pytest.raises(Refused, match="same length"):
        accuracy(one, torch.zeros(1, 1).long())
    with pytest.raises(Refused, match="needs the victim's predictions"):
        attack_success(one, one, one, 1, among="victim")
    with pytest.raises(Refused, match="no ASR among 'Victim'; available: model, victim, all"):
        attack_success(one, one, one, 1, among="Victim")  # pyright: ignore[reportArgumentType]
    for count, total in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(Refused, match="is not a share"):
            wilson(count, total)


@given(CASES, st.sampled_from([1, "next"]))
def test_targets_may_differ_from_image_to_image(cases, target):
    labels, clean, triggered, _ = columns(cases)
    goal = goals(labels, target, 3)
    counted = [
        (one, aim, label) for label, seen, one, aim in zip(*map(torch.Tensor.tolist, (labels, clean, triggered, goal)), strict=True)
        if label != aim and seen == label
    ]  # fmt: skip
    if not counted:
        with pytest.raises(Refused, match="counts for the ASR"):
            attack_success(clean, triggered, labels, goal)
        return
    expected = sum(one == aim for one, aim, _ in counted) / len(counted)
    assert attack_success(clean, triggered, labels, goal) == expected
    if target == 1:
        assert attack_success(clean, triggered, labels, 1) == expected
        assert robust_accuracy(triggered, labels, goal) == robust_accuracy(triggered, labels, 1)


@given(CASES)
def test_rates_by_class_add_up_to_the_whole(cases):
    predicted, labels, seen, _ = columns(cases)
    counted = seen > 0
    rates = per_class(predicted == labels, counted, labels, 3)
    sizes = [int(((labels == label) & counted).sum()) for label in range(3)]
    assert [rate is None for rate in rates] == [size == 0 for size in sizes]
    hits = sum(rate * size for rate, size in zip(rates, sizes, strict=True) if rate is not None)
    assert hits == pytest.approx(int(((predicted == labels) & counted).sum()))


def test_what_is_not_shown_to_a_network_changes_no_rate(monkeypatch):
    """All rates against those of passes over all images by the network as it is."""
    from conftest import victim

    from dhbe.attacks.triggers import badnets
    from dhbe.data import Images
    from dhbe.evaluation import measuring
    from dhbe.evaluation.evidence import Evidence
    from dhbe.training import predict

    model, other = victim(), victim(seed=1)
    pixels = torch.randint(256, (90, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    told = Images(pixels, torch.zeros(90, dtype=torch.int64), tuple("abcd"))
    labels = torch.where(torch.arange(90) % 3 == 0, torch.arange(90) % 4, predict(model, told))
    images, trigger = Images(pixels, labels, tuple("abcd")), badnets(3, (3, 8, 8))
    shown = []
    monkeypatch.setattr(measuring, "WORTH", 1)
    monkeypatch.setattr(measuring, "predict", lambda m, i, t=None: shown.append(len(i)) or predict(m, i, t))
    for target, source in ((1, None), ("next", None), (2, int(labels[1]))):
        if source == target:
            continue
        measured = measuring.measured(model, Evidence(images, "", trigger, target, source), other)
        clean, base = predict(model, images), predict(other, images)
        goal = goals(labels, target, 4)
        ours = torch.ones(90, dtype=torch.bool) if source is None else labels == source
        for name, form, among in (
            ("asr", trigger, "model"), ("asr_victim", trigger, "victim"), ("asr_all", trigger, "all"),
            ("asr_x4", trigger.amplified(4), "model"), ("asr_x9", trigger.amplified(9), "model"),
        ):  # fmt: skip
            led = predict(model, images, form)
            counted = [each[ours] for each in (clean, led, labels, goal, base)]
            assert getattr(measured, name) == attack_success(*counted, among), (name, target)
        assert measured.ra == robust_accuracy(predict(model, images, trigger)[ours], labels[ours], goal[ours])
    assert sum(shown) < 0.9 * 90 * len(shown)
