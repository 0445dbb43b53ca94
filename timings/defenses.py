"""CPU time of one step of each peer defence against a plain loop of its paper's procedure, on the same network.

The plain loops do what a straightforward script does: images go through Python one by one, all weight gradients are
computed wherever a graph exists, channels are visited in loops, optimisers are unfused, upsampling comes before the
convolution. Ours is the package's own loop, one round at a time. Both run in turns on the same machine.

    python -m timings.defenses
    python -m timings.defenses --only clp nad --repeats 9 --json defenses.json
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dhbe import networks
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.defenses import PEERS, Known
from dhbe.defenses.peers.layers import trace
from dhbe.run_state import RunState
from dhbe.steps import channels_last
from timings.iteration import NOISE, machine, neighbours, plain_images

STEPS, BATCH, CLASSES, SHAPE = 4, 64, 10, (3, 32, 32)
SETTINGS = {
    "epochs": 10**6, "size": STEPS * BATCH, "batch": BATCH, "teacher_epochs": 1, "search_epochs": 10**6, "search_batch": BATCH,
    "search_size": BATCH, "iterations": 10**6, "student_steps": 5, "steps": 10**6, "batches": 1, "held": 0.5,
    "tolerance": 1.0,
}  # fmt: skip
"""A round of a defence that tunes is four steps; of Neural Cleanse one for each class; of the others one."""

Work = Callable[[], None]


def victim(arch: str) -> Classifier:
    """An untrained classifier; times do not depend on its weights."""
    torch.manual_seed(0)
    return Classifier(networks.build(arch, CLASSES, SHAPE), shape=SHAPE, classes=CLASSES).eval()


def lent() -> Images:
    """Images of noise for one round."""
    pixels = torch.randint(256, (STEPS * BATCH, *SHAPE), dtype=torch.uint8)
    return Images(pixels, torch.arange(len(pixels)) % CLASSES, tuple(map(str, range(CLASSES))))


# ---- plain loops


class OneByOne(torch.utils.data.Dataset):
    """Images that are cropped, flipped and scaled one at a time, as in transformation pipelines."""

    def __init__(self, images: Images) -> None:
        self.pixels, self.labels = images.pixels.permute(0, 2, 3, 1).numpy(), images.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        padded = np.pad(self.pixels[index], ((4, 4), (4, 4), (0, 0)))
        top, left = torch.randint(9, (2,)).tolist()
        image = padded[top : top + 32, left : left + 32]
        image = image[:, ::-1] if torch.rand(()) < 0.5 else image
        return torch.from_numpy(image.copy()).permute(2, 0, 1).float().div(255), self.labels[index]


def loader(images: Images) -> torch.utils.data.DataLoader:
    """The images one by one, in batches."""
    return torch.utils.data.DataLoader(OneByOne(images), BATCH, shuffle=True, drop_last=True)


def sgd(parameters: object) -> torch.optim.Optimizer:
    """SGD as in a plain script."""
    return torch.optim.SGD(parameters, 0.01, momentum=0.9, foreach=False, fused=False)


def adam(parameters: object) -> torch.optim.Optimizer:
    """Adam as in a plain script."""
    return torch.optim.Adam(parameters, 1e-3, foreach=False, fused=False)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def plain_finetuning(model: Classifier, images: Images) -> Work:
    """An epoch of finetuning."""
    learn, batches = sgd(model.train().parameters()), loader(images)

    def work() -> None:
        for pixels, labels in batches:
            loss = F.cross_entropy(model(pixels), labels)
            descend(learn, loss)
            loss.item()

    return work


def plain_pruning(model: Classifier, images: Images) -> Work:
    """Prunes channels one by one, with the accuracy measured after each."""
    graph = trace(model)

    def work() -> None:
        head = copy.deepcopy(graph.reader)
        for channel in range(graph.channels - 1):
            graph.reader.weight.data[:, channel] = 0
            with torch.no_grad():
                for pixels, labels in images.subset(slice(len(images) // 2)).batches(BATCH):
                    (model(pixels).argmax(1) == labels).float().mean().item()
        graph.reader.load_state_dict(head.state_dict())

    return work


def plain_mcr(model: Classifier, images: Images) -> Work:
    """An epoch of the curve, with its three points as networks."""
    ends = [copy.deepcopy(model) for _ in range(3)]
    learn, batches = sgd(ends[1].parameters()), loader(images)

    def work() -> None:
        for pixels, labels in batches:
            t = torch.rand(()).item()
            parts = zip(*(end.named_parameters() for end in ends), strict=True)
            weights = {a[0]: (1 - t) ** 2 * a[1] + 2 * t * (1 - t) * b[1] + t**2 * c[1] for a, b, c in parts}
            loss = F.cross_entropy(functional_call(model.train(), weights, pixels), labels)
            descend(learn, loss)
            loss.item()

    return work


def plain_nad(model: Classifier, images: Images) -> Work:
    """An epoch in which the teacher keeps its graph."""
    teacher = copy.deepcopy(model).eval()
    learn, batches, names = sgd(model.train().parameters()), loader(images), [tap.name for tap in trace(model).stages]

    def maps(network: Classifier, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        seen: list[Tensor] = []
        hooks = [network.network.get_submodule(n).register_forward_hook(lambda m, i, o: seen.append(o)) for n in names]
        logits = network(pixels)
        for hook in hooks:
            hook.remove()
        squares = [x.abs().pow(2).sum(1, keepdim=True) for x in seen]
        return [s / torch.norm(s, dim=(2, 3), keepdim=True) for s in squares], logits

    def work() -> None:
        for pixels, labels in batches:
            (own, logits), (other, _) = maps(model, pixels), maps(teacher, pixels)
            gaps = [1000 * F.mse_loss(a, b.detach()) for a, b in zip(own, other, strict=True)]
            loss = F.cross_entropy(logits, labels) + sum(gaps)
            descend(learn, loss)
            loss.item()

    return work


def plain_cleanse(model: Classifier, images: Images) -> Work:
    """One step of the search for each class; weights get gradients too."""
    model.train(False)

    def work() -> None:
        for label in range(CLASSES):
            mask, pattern = (torch.zeros(1, c, 32, 32, requires_grad=True) for c in (1, 3))
            pixels = images.float(slice(BATCH))
            m, p = (torch.tanh(x) / 2 + 0.5 for x in (mask, pattern))
            logits = model((1 - m) * pixels + m * p)
            loss = F.cross_entropy(logits, torch.full((BATCH,), label)) + 1e-3 * m.abs().sum()
            descend(adam([mask, pattern]), loss)
            (logits.argmax(1) == label).float().mean().item()

    return work


def plain_gdm(model: Classifier, images: Images) -> Work:
    """An epoch of the three generators; patches are placed one by one."""

    def network(inputs: int, outputs: int) -> nn.Module:
        layers = [nn.Linear(inputs, 512), nn.LeakyReLU(0.2), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, outputs)]
        return nn.Sequential(*(layers if outputs == 1 else [*layers[:2], nn.Linear(512, outputs), nn.Sigmoid()]))

    stairs = [(network(64, 27), network(91, 1)) for _ in range(3)]
    optimizers, batches = [adam([*g.parameters(), *t.parameters()]) for g, t in stairs], loader(images)

    def work() -> None:
        for pixels, _ in batches:
            for (make, judge), optimizer, beta in zip(stairs, optimizers, (0.5, 0.8, 0.9), strict=True):
                noise, apart = torch.rand(BATCH, 64), torch.rand(BATCH, 64)
                triggers = make(noise)
                stamped = pixels.clone()
                for i in range(BATCH):
                    top, left = torch.randint(30, (2,)).tolist()
                    stamped[i, :, top : top + 3, left : left + 3] = triggers[i].view(3, 3, 3)
                odds = model.eval()(stamped).softmax(1)[:, 0]
                joint, product = (judge(torch.cat([triggers, z], 1)) for z in (noise, apart))
                information = joint.mean() - product.exp().mean().log()
                loss = -torch.minimum(odds, torch.tensor(beta)).mean() - 0.1 * information
                descend(optimizer, loss)
                loss.item()

    return work


def plain_clp(model: Classifier, images: Images) -> Work:
    """A decomposition for each channel, on a copy whose layers are traced again, as in ours."""

    def work() -> None:
        for conv, norm in trace(copy.deepcopy(model)).normalised:
            bounds = []
            for channel in range(norm.num_features):
                gain = (norm.weight[channel] / (norm.running_var[channel] + norm.eps).sqrt()).abs()
                bounds.append(gain * torch.svd(conv.weight[channel].reshape(conv.weight.shape[1], -1))[1].max())
            values = torch.stack(bounds).detach()
            for channel in torch.where(values > values.mean() + 3 * values.std())[0]:
                norm.weight.data[channel] = 0
                norm.bias.data[channel] = 0

    return work


def plain_imitation(model: Classifier, images: Images, shuffled: int = 0) -> Work:
    """One round: five student steps and one of the generator."""
    student, teacher, make = copy.deepcopy(model).train(), copy.deepcopy(model).eval(), plain_images()
    others = [copy.deepcopy(teacher) for _ in range(shuffled)]
    learn, imagine = sgd(student.parameters()), adam(make.parameters())

    def work() -> None:
        for _ in range(5):
            x = make(torch.randn(BATCH, NOISE)).detach()
            loss = F.l1_loss(student.logits(x), teacher.logits(x).detach())
            descend(learn, loss)
            loss.item()
        x = make(torch.randn(BATCH, NOISE))
        answer = teacher.logits(x)
        loss = -F.l1_loss(student.logits(x), answer)
        if others:
            mixed = torch.stack([other.logits(x) for other in others]).mean(0)
            each = F.kl_div(mixed.log_softmax(1), answer.softmax(1), reduction="none").mean(1)
            same = mixed.argmax(1).eq(answer.argmax(1)).float()
            loss = loss - 0.1 * (each * same).sum() / same.sum().clamp_min(1)
        descend(imagine, loss)
        loss.item()

    return work


def plain_unlearning(model: Classifier, images: Images) -> Work:
    """One step of unlearning on noise."""
    forget = sgd(model.train().parameters())

    def work() -> None:
        loss = F.cross_entropy(model(torch.rand(BATCH, *SHAPE)), torch.randint(CLASSES, (BATCH,)))
        descend(forget, -loss)
        loss.item()

    return work


def plain_inversion(model: Classifier, images: Images) -> Work:
    """One step on a batch of images; weights get gradients too."""
    x = torch.randn(BATCH, *SHAPE, requires_grad=True)
    imagine, gaps = adam([x]), []

    def see(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        flat = inputs[0].permute(1, 0, 2, 3).reshape(inputs[0].shape[1], -1)
        mean, variance = flat.mean(1), flat.var(1, unbiased=False)
        gaps.append((layer.running_mean - mean).norm() + (layer.running_var - variance).norm())

    for layer in model.eval().modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(see)

    def work() -> None:
        gaps.clear()
        moved = torch.roll(x, torch.randint(-2, 3, (2,)).tolist(), (2, 3))
        loss = F.cross_entropy(model.logits(moved), torch.arange(BATCH) % CLASSES)
        loss = loss + 10 * sum(gaps) + 1e-3 * neighbours(moved)
        model.zero_grad()
        descend(imagine, loss)
        loss.item()

    return work


PLAIN: dict[str, Callable[[Classifier, Images], Work]] = {
    "finetuning": plain_finetuning, "fine-pruning": plain_pruning, "mcr": plain_mcr, "nad": plain_nad,
    "neural-cleanse": plain_cleanse, "gdm": plain_gdm, "clp": plain_clp, "dfad": plain_imitation,
    "otbr": plain_unlearning, "abd": lambda model, images: plain_imitation(model, images, 3),
    "inversion": plain_inversion,
}  # fmt: skip


# ---- ours


def ours(name: str, model: Classifier, images: Images) -> Work:
    """One round of the package's own loop; for defences of one round, the whole run."""
    kind = PEERS[name]
    defense = kind(**{key: value for key, value in SETTINGS.items() if key in kind.__dataclass_fields__})
    known = Known(clean=images, target=0)
    if name in ("clp", "fine-pruning"):  # what sets them apart happens in the first round
        return lambda: next(defense.run(copy.deepcopy(model).train(), known, RunState())) and None
    model = copy.deepcopy(model)
    channels_last(model)  # as `Defense.__call__` does
    rounds = defense.run(model.train(), known, RunState())
    if name == "nad":
        next(rounds)  # the teacher's

    def work() -> None:
        for value in next(rounds).values():
            float(value.detach())

    return work


def seconds(work: Work) -> float:
    """CPU time of one call over all threads, which depends little on other load."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(name: str, arch: str, repeats: int) -> dict[str, list[float]]:
    """Alternating times of both, after one warm-up call of each."""
    images = lent()
    both = {"ours": ours(name, victim(arch), images), "plain": PLAIN[name](victim(arch), images)}
    for work in both.values():
        work()
    times: dict[str, list[float]] = {who: [] for who in both}
    for repeat in range(repeats):
        for who in list(both)[:: 1 if repeat % 2 else -1]:
            times[who].append(seconds(both[who]))
    return times


def main() -> None:
    """Reads the options, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="wrn16-1", help="network (default: wrn16-1)")
    parser.add_argument("--only", nargs="+", default=list(PEERS), choices=list(PEERS), help="defences (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each (default: 5)")
    parser.add_argument("--note", default="", help="what else the machine was doing, for the record")
    parser.add_argument("--json", type=Path, help="write the record there")
    args = parser.parse_args()
    found = {}
    for name in args.only:
        times = measure(name, args.arch, args.repeats)
        middle = {who: statistics.median(values) for who, values in times.items()}
        found[name] = {"seconds": times, "ratio": middle["plain"] / middle["ours"]}
        print(f"{name:15} ours {middle['ours']:.4f} s, plain {middle['plain']:.4f} s, {found[name]['ratio']:.2f} x")
    if args.json:
        settings = {"arch": args.arch, "batch": BATCH, "repeats": args.repeats, "note": args.note}
        record = {"settings": settings, "machine": machine(torch.device("cpu")), "defenses": found}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
