"""Time of measuring ACC, ASR and ASR x9 against a plain loop, on the same network and images, in turns.

Ours is what `dhbe score` does for these three rates: a batch is triggered at once, and clean images are
classified once. The plain loop does what a straightforward script does: images are triggered in Python one by one, and
each rate has a pass of its own. Both must come to the same rates, or the benchmark fails.

    python -m timings.evaluation
    python -m timings.evaluation --arch resnet18 --images 2048 --repeats 9 --json evaluation.json
"""

import sys

import torch
from torch import Tensor

from dhbe.attacks.triggers import Patch, badnets
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.evaluation import metrics
from dhbe.training import predict
from timings.defenses import CLASSES, SHAPE, victim
from timings.training import noise
from timings.turns import Work, arguments, compare

BATCH = 128


class Triggered(torch.utils.data.Dataset):
    """Images that are scaled and stamped one at a time, with one copy of the patch after another."""

    def __init__(self, images: Images, patch: Patch, places: list[tuple[int, int]]) -> None:
        self.pixels, self.labels, self.places = images.pixels.permute(0, 2, 3, 1).numpy(), images.labels, places
        self.pattern = patch.pattern[:, *patch.box]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = torch.from_numpy(self.pixels[index].copy()).permute(2, 0, 1).float().div(255)
        _, height, width = self.pattern.shape
        for top, left in self.places:
            image[:, top : top + height, left : left + width] = self.pattern
        return image, self.labels[index]


def ours(model: Classifier, images: Images, trigger: Patch, target: int) -> Work:
    """The three rates by the package's own functions."""

    def work() -> list[float]:
        clean = predict(model, images)
        forms = [trigger, trigger.amplified(9)]
        rates = [metrics.attack_success(clean, predict(model, images, form), images.labels, target) for form in forms]
        return [metrics.accuracy(clean, images.labels), *rates]

    return work


def plain(model: Classifier, images: Images, trigger: Patch, target: int) -> Work:
    """The three rates as in a straightforward script."""
    rows, columns = trigger.box
    own = (rows.start, columns.start)
    every = [(top, left) for top in (0, own[0] // 2, own[0]) for left in (0, own[1] // 2, own[1])]

    def batches(places: list[tuple[int, int]]) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(Triggered(images, trigger, places), BATCH)

    @torch.no_grad()
    def work() -> list[float]:
        right, total = 0, 0
        for pixels, labels in batches([]):
            right += (model(pixels).argmax(1) == labels).sum().item()
            total += len(labels)
        rates = [right / total]
        for places in ([own], every):
            hits, counted = 0, 0
            for (pixels, labels), (stamped, _) in zip(batches([]), batches(places), strict=True):
                ours = (model(pixels).argmax(1) == labels) & (labels != target)
                hits += (ours & (model(stamped).argmax(1) == target)).sum().item()
                counted += ours.sum().item()
            rates.append(hits / counted)
        return rates

    return work


if __name__ == "__main__":
    args = arguments(__doc__.splitlines()[0], images=1024, repeats=5)
    images, model = noise(args.images), victim(args.arch)
    target = (int(predict(model, images).mode().values) + 1) % CLASSES  # so that some are right, and not the target's
    both = {who: make(model, images, badnets(3, SHAPE), target) for who, make in (("ours", ours), ("plain", plain))}
    rates = {who: work() for who, work in both.items()}
    if rates["ours"] != rates["plain"]:
        sys.exit(f"the two do not count alike: {rates}")
    print(f"rates  ACC {rates['ours'][0]:.4f}, ASR {rates['ours'][1]:.4f}, ASR x9 {rates['ours'][2]:.4f}")
    compare(args, both)
