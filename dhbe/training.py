"""Supervised training and prediction. The whole data set is on the device; an epoch is a permutation of it."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.classifier import Classifier, evaluating
from dhbe.data import Images
from dhbe.errors import Failed, Refused
from dhbe.run_state import RunState
from dhbe.settings import Setting
from dhbe.steps import Precision, channels_last, computing

Schedule = Literal["one-cycle", "steps"]
Watch = Callable[[dict[str, float]], None]
Perturb = Callable[[Tensor, Tensor], Tensor]

WARM_UP = 0.25
"""Share of a one-cycle schedule in which the learning rate rises."""

SMALLER = (0.5, 0.75)
"""Initial image sides of training with growing resolution, as shares of the full side."""


def ignore(epoch: dict[str, float]) -> None:
    """The default watcher: does nothing."""


@dataclass(frozen=True)
class Fit:
    """Trains a classifier by SGD with Nesterov momentum; the defaults train a ResNet on CIFAR-10.

    Random choices come from torch's global generator on the CPU, which the caller seeds.
    """

    epochs: Annotated[int, Setting("passes over the images", least=1)]
    batch: Annotated[int, Setting("images per step; an incomplete last batch is dropped")] = 128
    lr: Annotated[float, Setting("largest learning rate")] = 0.1
    momentum: Annotated[float, Setting("Nesterov momentum of SGD")] = 0.9
    weight_decay: Annotated[float, Setting("weight decay")] = 5e-4
    schedule: Annotated[
        Schedule,
        Setting(
            "one-cycle: linear rise, then linear decay to 0. steps: x0.1 after half and again after three quarters."
        ),
    ] = "one-cycle"
    crop: Annotated[
        int, Setting("pixels of zero padding on each side before a random crop back to size; 0 does not crop")
    ] = 4
    flip: Annotated[bool, Setting("flip half of the images horizontally")] = True
    label_smoothing: Annotated[float, Setting("share of each label that is distributed over all classes")] = 0.0
    grow: Annotated[
        float,
        Setting(
            "share of the epochs that use smaller images, first of half, then of three quarters of the side, for speed",
            below=1,
        ),
    ] = 0.0

    def __call__(
        self,
        classifier: Classifier,
        images: Images,
        watch: Watch = ignore,
        *,
        tuned: Sequence[nn.Module] | None = None,
        perturb: Perturb | None = None,
        precision: Precision = "fp32",
        run_state: RunState | None = None,
    ) -> Classifier:
        """Trains `classifier` in place, on its device, and returns it in eval mode.

        With a growing resolution, whole images are scaled down, with any trigger on them: a trigger at full size is learned
        in the last epochs only.

        Args:
            classifier: The classifier to train.
            images: Training images; they are copied to the classifier's device.
            watch: Called after each epoch with `epoch` (from 1), `epochs`, `loss` and `acc` (means over the augmented
                images of the epoch) and `lr`.
            tuned: Parts of the classifier to train; the rest is frozen, in eval mode. None trains all parts.
            perturb: Changes the pixels [n, c, h, w] in [0, 1] of every batch, given with their labels [n], for adversarial
                training. It is called with the classifier in training mode.
            precision: bf16 runs the network under autocast.
            run_state: State to resume from, one epoch per round; None starts a fresh training.

        Raises:
            Refused: The settings are invalid, or the images do not fit the classifier.
            Failed: The loss is no longer finite.
        """
        self._check(classifier, images)
        device = classifier.mean.device
        images = images.to(device)
        channels_last(classifier)
        trained = [classifier] if tuned is None else tuned
        parameters = [parameter for part in trained for parameter in part.parameters()]
        optimizer = torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )
        run_state = run_state or RunState()
        run_state.register(classifier=classifier, optimizer=optimizer)
        with _fixed(classifier, parameters):
            for epoch in range(run_state.restore(), self.epochs):
                classifier.eval()
                for part in trained:
                    part.train()  # in each epoch, as a watcher may have changed the mode
                loss, right, seen = self._epoch(classifier, images, optimizer, epoch, perturb, precision)
                if not math.isfinite(loss):
                    raise Failed(
                        f"training diverged in epoch {epoch + 1} of {self.epochs}: lower the learning rate {self.lr:g}"
                    )
                run_state.advance()
                lr = optimizer.param_groups[0]["lr"]
                watch({"epoch": epoch + 1, "epochs": self.epochs, "loss": loss, "acc": right / seen, "lr": lr})
        classifier.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue] (missing in torch's stub)
        return classifier.eval()

    def rate(self, share: float) -> float:
        """Learning rate after a share in [0, 1] of all steps."""
        if self.schedule == "one-cycle":
            return self.lr * min(share / WARM_UP, (1 - share) / (1 - WARM_UP))
        return self.lr * 0.1 ** ((share >= 0.5) + (share >= 0.75))

    def side(self, epoch: int, full: int) -> int:
        """Side in pixels at which images of side `full` are shown in an epoch, from 0."""
        stage = int(epoch * len(SMALLER) / (self.grow * self.epochs)) if self.grow else len(SMALLER)
        return round(SMALLER[stage] * full) if stage < len(SMALLER) else full

    def costs(self) -> list[float]:
        """The cost of each epoch relative to one at full size, assumed proportional to the area of the images."""
        return [(self.side(epoch, 1000) / 1000) ** 2 for epoch in range(self.epochs)]

    def _epoch(
        self,
        classifier: Classifier,
        images: Images,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        perturb: Perturb | None,
        precision: Precision,
    ) -> tuple[float, int, int]:
        """Trains for one epoch; returns the mean loss, the images classified correctly and the images seen."""
        device = images.pixels.device
        steps = max(1, len(images) // self.batch)
        total = torch.zeros((), device=device)
        right = torch.zeros((), device=device, dtype=torch.int64)
        batches = torch.randperm(len(images)).to(device).split(self.batch)[:steps]
        for step, index in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = self.rate((epoch * steps + step + 0.5) / (self.epochs * steps))
            pixels, labels = self._augment(images.pixels[index], epoch), images.labels[index]
            with computing(device, precision):
                if perturb:
                    pixels = perturb(pixels, labels)
                logits = classifier(pixels)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            right += (logits.argmax(1) == labels).sum()
        return total.item() / steps, int(right), sum(len(index) for index in batches)

    def _augment(self, pixels: Tensor, epoch: int) -> Tensor:
        n = len(pixels)
        offsets = torch.randint(2 * self.crop + 1, (2, n))
        flip = torch.rand(n) < (0.5 if self.flip else 0.0)
        moved = crop_and_flip(pixels, self.crop, offsets.to(pixels.device), flip.to(pixels.device))
        return self._scaled(moved.float() / 255, epoch)

    def _scaled(self, pixels: Tensor, epoch: int) -> Tensor:
        full = pixels.shape[-2:]
        size = [self.side(epoch, length) for length in full]
        return pixels if size == list(full) else F.interpolate(pixels, size, mode="area")

    def _check(self, classifier: Classifier, images: Images) -> None:
        if not (self.epochs >= 1 and self.batch >= 2 and self.lr > 0 and self.crop >= 0):  # NaN fails too
            raise Refused("training needs at least 1 epoch, batches of at least 2, lr above 0 and a crop of at least 0")
        if not (self.momentum >= 0 and self.weight_decay >= 0 and 0 <= self.label_smoothing <= 1):
            raise Refused("training needs momentum and weight_decay of at least 0 and label_smoothing from 0 to 1")
        if not 0 <= self.grow < 1:
            raise Refused(f"--grow {self.grow}: it must be a number of at least 0 and below 1")
        if self.schedule not in get_args(Schedule):
            raise Refused(f"no schedule {self.schedule!r}; available: {', '.join(get_args(Schedule))}")
        if images.shape != classifier.shape:
            raise Refused(f"the images are {images.shape}, the classifier takes {classifier.shape}")
        if len(images) < 2 or int(images.labels.max()) >= classifier.classes:  # BatchNorm needs two
            raise Refused(f"the training set must hold at least 2 images, with labels below {classifier.classes}")
        if self.grow:
            self._try_small(classifier)

    def _try_small(self, classifier: Classifier) -> None:
        shown = torch.zeros(1, *classifier.shape, device=classifier.mean.device)
        for epoch in range(self.epochs):
            try:
                with evaluating(classifier), torch.no_grad():
                    classifier(self._scaled(shown, epoch))
            except Exception as error:  # third-party code may raise anything
                raise Refused("this network takes images of one size only: give --grow=0") from error


RECIPES = {
    "usual": Fit(epochs=30),
    "fast": Fit(epochs=18, grow=2 / 3),
    "paper": Fit(epochs=200, schedule="steps"),
}
"""Settings by name: for ordinary training, for a large network on a small machine, and those of the DHBE paper."""


@contextmanager
def _fixed(classifier: Classifier, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Disables gradients of all other parameters inside, so that they are not computed."""
    numbers = {id(parameter) for parameter in trained}
    others = [each for each in classifier.parameters() if each.requires_grad and id(each) not in numbers]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_()


def crop_and_flip(pixels: Tensor, pad: int, offsets: Tensor, flip: Tensor) -> Tensor:
    """Crops each image to its own size from its zero-padded version, then flips some.

    Args:
        pixels: Images [n, c, h, w] of any type.
        pad: Zero padding on each side, in pixels.
        offsets: Row and column of each crop in the padded image, from 0 to 2 pad; int64 [2, n].
        flip: Which images to flip horizontally; bool [n].

    Returns:
        The crops [n, c, h, w], in channels-last memory order.
    """
    n, _, h, w = pixels.shape
    device = pixels.device
    rows = offsets[0, :, None] + torch.arange(h, device=device)
    columns = offsets[1, :, None] + torch.arange(w, device=device)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    padded = F.pad(pixels, (pad, pad, pad, pad))
    # A slice between index tensors moves the channels to the end: the result is channels-last without a copy.
    picked = padded[torch.arange(n, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def predict(
    classifier: Classifier, images: Images, transform: Callable[[Tensor], Tensor] | None = None, batch: int = 64
) -> Tensor:
    """Predicted classes, int64 [n], on the device of the images' labels.

    Args:
        classifier: Evaluated in eval mode; the modes of its modules are restored.
        images: The images to classify.
        transform: Applied to the pixels [n, c, h, w] in [0, 1] first, such as a trigger.
        batch: Images at a time; with more, activations exceed a CPU's caches, which takes twice as long.

    Raises:
        Refused: The images do not fit the classifier.
        Failed: The logits are not finite.
    """
    if images.shape != classifier.shape:
        raise Refused(f"the images are {images.shape}, the classifier takes {classifier.shape}")
    device = classifier.mean.device
    with evaluating(classifier), torch.inference_mode():
        shown = (pixels.to(device) for pixels, _ in images.batches(batch))
        parts = [classifier(transform(pixels) if transform else pixels) for pixels in shown]
    # Outside inference mode, as inference tensors cannot be labels of a loss.
    logits = torch.cat(parts or [torch.empty(0, classifier.classes, device=device)])
    if not logits.isfinite().all():
        raise Failed("the model's logits are not finite numbers: it has diverged or is damaged")
    return logits.argmax(1).to(images.labels.device)
