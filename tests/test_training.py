import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.errors import Failed, Refused
from dhbe.training import Fit, crop_and_flip, predict


def tiny(seed=0) -> Classifier:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return Classifier(nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(32, 2)), shape=(1, 6, 6), classes=2)


def halves(n=60) -> Images:
    """Class 0 is bright above, class 1 below."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(100, (n, 1, 6, 6), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % 2
    pixels[labels == 0, :, :3] += 120
    pixels[labels == 1, :, 3:] += 120
    return Images(pixels, labels, ("above", "below"))


def test_crop_and_flip_agree_with_slicing_one_by_one():
    pixels = torch.randint(256, (20, 3, 5, 7), dtype=torch.uint8)
    offsets, flip = torch.randint(5, (2, 20)), torch.rand(20) < 0.5
    moved = crop_and_flip(pixels, 2, offsets, flip)
    for image, result, (top, left), mirrored in zip(pixels, moved, offsets.T.tolist(), flip, strict=True):
        expected = F.pad(image, (2, 2, 2, 2))[:, top : top + 5, left : left + 7]
        assert torch.equal(result, expected.flip(2) if mirrored else expected)
    assert moved.is_contiguous(memory_format=torch.channels_last)


def test_fit_without_extras_is_plain_sgd():
    images, trained, expected = halves(), tiny(), tiny()
    fit = Fit(epochs=2, batch=16, lr=0.05, crop=0, flip=False, label_smoothing=0.1)
    trained.network[5] = expected.network[5] = nn.Identity()  # dropout draws from the same generator
    torch.manual_seed(3)
    fit(trained, images)
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    step = 0
    for _ in range(2):
        order = torch.randperm(60)
        for start in (0, 16, 32):
            index = order[start : start + 16]
            torch.randint(1, (2, 16)), torch.rand(16)  # what augmentation draws
            share = (step + 0.5) / 6
            optimizer.param_groups[0]["lr"] = 0.05 * min(share / 0.25, (1 - share) / 0.75)
            loss = F.cross_entropy(expected(images.float()[index]), images.labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    for ours, theirs in zip(trained.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_fit_learns_repeats_and_is_not_disturbed_by_a_watcher():
    images, seen = halves(), []
    one, other = tiny(), tiny()
    fit = Fit(epochs=8, batch=16, crop=0)

    def watch(epoch):
        seen.append(epoch)
        predict(one.eval(), images)

    torch.manual_seed(7)
    assert fit(one, images, watch) is one
    torch.manual_seed(7)
    fit(other, images)
    assert not one.training
    assert [epoch["epoch"] for epoch in seen] == list(range(1, 9))
    assert seen[-1]["acc"] == 1.0
    assert (predict(one, images) == images.labels).all()
    for ours, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_schedules():
    shares = (0, 0.125, 0.25, 0.625, 1)
    assert [Fit(1, lr=0.2).rate(s) for s in shares] == pytest.approx([0, 0.1, 0.2, 0.1, 0])
    steps = Fit(1, lr=1.0, schedule="steps")
    assert [steps.rate(s) for s in (0.49, 0.5, 0.74, 0.75)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_fewer_images_than_a_batch_still_make_a_step():
    before = tiny()
    after = Fit(epochs=1, batch=128)(copy.deepcopy(before), halves(10))
    assert not torch.equal(after.network[0].weight, before.network[0].weight)
    assert all(parameter.is_contiguous() for parameter in after.parameters())


def test_predict_is_batched_argmax_and_restores_modes():
    classifier, images = tiny().train(), halves()
    classifier.network[1].eval()
    modes = [module.training for module in classifier.modules()]
    state = copy.deepcopy(classifier.state_dict())
    predicted = predict(classifier, images, lambda pixels: 1 - pixels, batch=7)
    assert [module.training for module in classifier.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in classifier.state_dict().items())
    with torch.no_grad():
        expected = classifier.eval()(1 - images.float()).argmax(1)
    assert torch.equal(predicted, expected)
    assert predicted.dtype == torch.int64
    assert not predicted.is_inference()
    assert len(predict(classifier, images.subset(slice(0, 0)))) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "at least 1 epoch"),
        ({"batch": 1}, "batches of at least 2"),
        ({"label_smoothing": 2.0}, "label_smoothing from 0 to 1"),
        ({"momentum": -1.0}, "momentum"),
        ({"lr": 0.0}, "lr above 0"),
        ({"lr": float("nan")}, "lr above 0"),
        ({"crop": -1}, "crop of at least 0"),
        ({"grow": 1.0}, "below 1"),
        ({"schedule": "cosine"}, "no schedule 'cosine'; available: one-cycle, steps"),
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(Refused, match=message):
        Fit(**{"epochs": 1} | settings)(tiny(), halves())


def test_images_that_do_not_fit_are_refused():
    images = halves()
    wide = Images(images.pixels.repeat(1, 1, 1, 2), images.labels, images.names)
    third = Images(images.pixels, images.labels + 1, ("a", "b", "c"))
    for data, message in (
        (wide, "the classifier takes"),
        (third, "labels below 2"),
        (images.subset(slice(0, 1)), "at least 2 images"),
    ):
        with pytest.raises(Refused, match=message):
            Fit(epochs=1)(tiny(), data)
    with pytest.raises(Refused, match="the classifier takes"):
        predict(tiny(), wide)


def test_divergence_is_a_failure():
    with pytest.raises(Failed, match=r"diverged in epoch \d of 3: lower the learning rate 1e\+30"):
        Fit(epochs=3, batch=16, lr=1e30)(tiny(), halves())


def test_a_model_without_finite_logits_has_no_predictions():
    classifier = tiny()
    torch.nn.init.constant_(classifier.network[6].weight, float("nan"))
    with pytest.raises(Failed, match="not finite"):
        predict(classifier, halves())


def test_a_growing_training_begins_small_and_ends_at_full_size():
    fit = Fit(epochs=18, grow=2 / 3)
    assert [fit.side(epoch, 32) for epoch in range(18)] == [16] * 6 + [24] * 6 + [32] * 6
    assert sum(fit.costs()) == pytest.approx(6 * (0.25 + 0.5625 + 1))
    assert [Fit(epochs=3, grow=0.5).side(epoch, 28) for epoch in range(3)] == [14, 21, 28]
    assert [Fit(epochs=3).side(epoch, 28) for epoch in range(3)] == [28] * 3
    sides, model = [], tiny()
    model.register_forward_hook(lambda module, args, _: sides.append(args[0].shape[-1]) if module.training else None)
    Fit(epochs=4, batch=60, crop=0, grow=0.5)(model, halves())
    assert sides == [3, 4, 6, 6]


def test_a_scaled_image_is_the_mean_of_what_it_covers():
    pixels = torch.rand(2, 1, 6, 6)
    half = Fit(epochs=2, grow=0.5)._scaled(pixels, 0)
    assert torch.allclose(half, pixels.reshape(2, 1, 3, 2, 3, 2).mean((3, 5)))


def test_a_network_of_one_size_is_not_shown_smaller_images():
    flat = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), shape=(1, 6, 6), classes=2)
    with pytest.raises(Refused, match="takes images of one size only: give `grow=0`"):
        Fit(epochs=2, grow=0.5)(flat, halves())
    Fit(epochs=1, batch=16)(flat, halves())
