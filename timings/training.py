"""Time of an epoch of training a victim against a plain loop, on the same network and images, in turns.

Ours is `training.Fit`: all images in one tensor, cropped and mirrored a batch at a time. The plain loop does what a
straightforward script does: images go through Python one by one, the optimiser is unfused, NCHW.

    python -m timings.training
    python -m timings.training --arch resnet18 --images 2048 --repeats 9 --json training.json
"""

import torch
from torch import nn
from torch.nn import functional as F

from dhbe.data import Images
from dhbe.training import Fit
from timings.defenses import CLASSES, SHAPE, OneByOne, descend, victim
from timings.turns import Work, arguments, compare

BATCH = 128


def noise(count: int) -> Images:
    """Images of noise; times do not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, *SHAPE), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % CLASSES, tuple(map(str, range(CLASSES))))


def ours(arch: str, images: Images) -> Work:
    """An epoch of the package's own training."""
    model, fit = victim(arch), Fit(epochs=1, batch=BATCH)
    return lambda: fit(model, images)


def plain(arch: str, images: Images) -> Work:
    """An epoch as a straightforward script has it."""
    model: nn.Module = victim(arch)
    learn = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, foreach=False, fused=False)
    batches = torch.utils.data.DataLoader(OneByOne(images), BATCH, shuffle=True, drop_last=True)

    def work() -> None:
        model.train()
        total, right = 0.0, 0
        for pixels, labels in batches:
            logits = model(pixels)
            loss = F.cross_entropy(logits, labels)
            descend(learn, loss)
            total += loss.item()
            right += (logits.argmax(1) == labels).sum().item()

    return work


if __name__ == "__main__":
    args = arguments(__doc__.splitlines()[0], images=1024, repeats=5)
    compare(args, {who: make(args.arch, noise(args.images)) for who, make in (("ours", ours), ("plain", plain))})
