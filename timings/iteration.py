"""Time of one iteration of DHBE (k student steps, one of G, one of R) against a plain loop of the same method.

Both run on the same network, batch, k and patch, in turns. Ours is the preset `fast`, whose generator of images works
before the rounds and not in them (a line tells what a round costs with its share of that), or `official`, which does
what the plain loop does. The plain loop is what a straightforward script does: NCHW,
nearest-neighbour upsampling before each convolution, generators run with gradients and detached, a teacher that keeps
its graph, all weight gradients in the generators' steps, unfused optimisers, a canvas for the patch.

The operation floor is the time in which the device could do the convolutions and products that our iteration needs, at
the best rate that it reaches here on large ones.

    python -m timings.iteration
    python -m timings.iteration --arch resnet18 --device cuda --precision bf16 --json iteration.json
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dhbe import networks
from dhbe.classifier import Classifier
from dhbe.defenses import DHBE, Eraser, FastDHBE, Known
from dhbe.run_state import RunState
from dhbe.search.families import Bounds
from dhbe.search.survey import Survey

NOISE, SIDE, CHANNELS, PATCH, CLASSES = 256, 32, 3, 5, 10
ALPHA, PRIOR = 0.1, 1e-4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

ROUNDS = {"fast": FastDHBE().look_every, "official": 1}
"""In one call of ours."""

Iteration = Callable[[], None]
Values = tuple[float, ...]


def cast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast without its weight cache, which would keep the weights of the first step."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


# ---- the plain loop


def plain_images() -> nn.Module:
    """G by its layers."""
    return nn.Sequential(
        nn.Linear(NOISE, 128 * 8 * 8),
        nn.Unflatten(1, (128, 8, 8)),
        nn.BatchNorm2d(128),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.BatchNorm2d(128),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(128, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(64, CHANNELS, 3, padding=1),
        nn.Tanh(),
        nn.BatchNorm2d(CHANNELS, affine=False),
    )


def plain_triggers() -> nn.Module:
    """R by its layers."""
    return nn.Sequential(
        nn.Linear(NOISE, 64 * PATCH**2),
        nn.Unflatten(1, (64, PATCH, PATCH)),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, CHANNELS, 3, padding=1),
        nn.BatchNorm2d(CHANNELS, affine=False),
        nn.Tanh(),
    )


def neighbours(x: Tensor) -> Tensor:
    """Sum of the norms of differences in four directions."""
    return (
        torch.norm(x[:, :, :, :-1] - x[:, :, :, 1:])
        + torch.norm(x[:, :, :-1] - x[:, :, 1:])
        + torch.norm(x[:, :, :-1, :-1] - x[:, :, 1:, 1:])
        + torch.norm(x[:, :, 1:, :-1] - x[:, :, :-1, 1:])
    )


def plain(
    network: nn.Module, batch: int, k: int, device: torch.device, precision: str, mean: Values = MEAN, std: Values = STD
) -> tuple[Iteration, nn.Module]:
    """One iteration as in a straightforward script, and the student that it trains."""
    student, teacher = copy.deepcopy(network).train(), copy.deepcopy(network).eval()
    images, triggers = plain_images().to(device), plain_triggers().to(device)
    unfused = {"foreach": False, "fused": False}
    learn = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, **unfused)
    imagine = torch.optim.Adam(images.parameters(), 1e-3, **unfused)
    attack = torch.optim.Adam(triggers.parameters(), 1e-3, **unfused)
    middle, width = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))

    def stamp(x: Tensor) -> Tensor:
        patches = triggers(torch.randn(batch, NOISE, device=device))
        top, left = torch.randint(SIDE - PATCH + 1, (2,)).tolist()
        canvas = torch.zeros(batch, CHANNELS, SIDE, SIDE, device=device)
        canvas[:, :, top : top + PATCH, left : left + PATCH] = patches
        return (x * width + middle + canvas - middle) / width

    def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        loss.backward()
        optimizer.step()

    def noise() -> Tensor:
        return torch.randn(batch, NOISE, device=device)

    def iteration() -> None:
        for _ in range(k):
            learn.zero_grad()
            x = images(noise()).detach()
            triggered = stamp(x).detach()
            answer = teacher(x).detach()
            clean = student(x)
            restriction = F.l1_loss(student(triggered), clean.detach())
            step(learn, F.l1_loss(clean, answer) + ALPHA * restriction)
        imagine.zero_grad()
        x = images(noise())
        step(imagine, PRIOR * neighbours(x) - F.l1_loss(student(x), teacher(x)))
        attack.zero_grad()
        x = images(noise()).detach()
        clean = student(x).detach()
        step(attack, -F.l1_loss(student(stamp(x)), clean))

    def run() -> None:
        with cast(device, precision):
            iteration()

    return run, student


# ---- ours


def ours(network: nn.Module, batch: int, k: int, device: torch.device, precision: str, preset: str) -> Iteration:
    """One iteration of the package: its own loop, one round at a time, as `Defense.__call__` drives it.

    Of `fast` it is a cycle of rounds at whose beginning all that was found is retried; `ROUNDS` are in it.
    """
    model = Classifier(copy.deepcopy(network), shape=(CHANNELS, SIDE, SIDE), classes=CLASSES, mean=MEAN, std=STD).to(
        device
    )
    same = {"iterations": 10**6, "student_steps": k, "batch": batch}
    if preset == "fast":  # one round of warm-up, for its triggers
        survey = Survey(warm_up=1, search_batch=batch, bounds=Bounds(patch=PATCH))
        settings: Eraser = FastDHBE(survey=survey, **same)
    else:
        settings = DHBE(alpha=ALPHA, smooth=PRIOR, detach_clean=True, patch=PATCH, **same)
    rounds: Iterator[dict[str, Tensor]] = settings.run(model.train(), Known(), RunState())

    def iteration() -> None:
        with torch.device(device), cast(device, precision):
            for _ in range(ROUNDS[preset]):
                next(rounds)

    if preset == "fast":
        with torch.device(device), cast(device, precision):
            until_the_student_moves(rounds)
        for _ in range(ROUNDS[preset] - 1):  # so that looks come at the end of an iteration
            with torch.device(device), cast(device, precision):
                next(rounds)
    return iteration


def warm_up(network: nn.Module, batch: int, device: torch.device, precision: str) -> float:
    """Seconds of the preset `fast` until its student has taken one step, divided by the rounds of a cycle."""
    model = Classifier(copy.deepcopy(network), shape=(CHANNELS, SIDE, SIDE), classes=CLASSES, mean=MEAN, std=STD).to(
        device
    )
    settings = FastDHBE(batch=batch, survey=Survey(search_batch=batch, bounds=Bounds(patch=PATCH)))
    began = time.perf_counter()
    with torch.device(device), cast(device, precision):
        rounds = settings.run(model.train(), Known(), RunState())
        until_the_student_moves(rounds)
    wait(device)
    return (time.perf_counter() - began) / settings.iterations


def until_the_student_moves(rounds: Iterator[dict[str, Tensor]]) -> None:
    """All rounds of the search, its conclusion, and the first round of the student."""
    while "agreement" not in next(rounds):
        pass


# ---- measuring


def seconds(work: Iteration, device: torch.device) -> float:
    """Time of one call, with the device synchronised before and after."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations(work: Iteration) -> int:
    """Floating-point operations of convolutions and matrix products in one call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def probes(batch: int, device: torch.device, precision: str) -> dict[str, tuple[Iteration, float]]:
    """Large products and convolutions with their operation counts, to measure the device's peak rate."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    found: dict[str, tuple[Iteration, float]] = {"product": (lambda: torch.mm(a, b), 2.0 * size**3)}
    for channels, side in ((64, 32), (128, 16), (256, 16)):
        x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)

        def convolve(x: Tensor = x, weight: Tensor = weight) -> None:
            with torch.no_grad():
                F.conv2d(x, weight, padding=1)

        found[f"convolution {channels} at {side} px"] = (convolve, 2.0 * batch * side**2 * channels**2 * 9)
    return found


@dataclass(frozen=True)
class Spread:
    """Repeated times in seconds."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def __str__(self) -> str:
        return f"median {self.median:.4f} s, from {min(self.times):.4f} to {max(self.times):.4f} s"


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Alternates both loops and the probes, so that all run under the same conditions."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    network = networks.build(args.arch, CLASSES, (CHANNELS, SIDE, SIDE)).to(device)
    both = {
        "ours": ours(network, args.batch, args.steps, device, args.precision, args.preset),
        "plain": plain(network, args.batch, args.steps, device, args.plain_precision)[0],
    }
    share = {"ours": ROUNDS[args.preset], "plain": 1}
    counts = {name: operations(work) // share[name] for name, work in both.items()}  # this also warms up
    for work in both.values():
        work()
    rates, times = dict[str, float](), {name: list[float]() for name in both}
    large = probes(args.batch, device, args.precision)
    for repeat in range(args.repeats):
        for name in list(both) if repeat % 2 == 0 else list(both)[::-1]:
            times[name].append(seconds(both[name], device) / share[name])
        for name, (work, count) in large.items():
            work()
            rates[name] = max(rates.get(name, 0.0), *(count / seconds(work, device) for _ in range(3)))
    spreads = {name: Spread(tuple(values)) for name, values in times.items()}
    best = max(rates, key=lambda name: rates[name])
    floor = counts["ours"] / rates[best]
    for name, spread in spreads.items():
        print(f"{name:6} {spread}; {counts[name] / 1e9:.2f} G operations, {counts[name] / spread.median / 1e9:.1f} G/s")
    for name, rate in rates.items():
        print(f"peak   {name}: {rate / 1e9:.1f} G operations/s{' (taken)' if name == best else ''}")
    print(f"floor  {floor:.4f} s for our operations")
    before = warm_up(network, args.batch, device, args.precision) if args.preset == "fast" else 0.0
    whole = spreads["plain"].median / (spreads["ours"].median + before)
    if before:
        print(f"warm-up {before:.4f} s for each round: with it {whole:.2f} x of the plain loop")
    return {
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        "machine": machine(device),
        "seconds": {name: spread.times for name, spread in spreads.items()},
        "operations": counts,
        "peak": rates,
        "warm_up": before,
        "ratio_with_warm_up": whole,
        "ratio": spreads["plain"].median / spreads["ours"].median,
        "share_of_floor": floor / spreads["ours"].median,
    }


def machine(device: torch.device) -> dict[str, object]:
    """What the results depend on besides the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "tf32": torch.backends.cudnn.allow_tf32 if device.type == "cuda" else None,
    }


def main() -> None:
    """Reads the options, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=["fast", "official"], default="fast", help="ours (default: fast)")
    parser.add_argument("--arch", default="wrn16-1", help="network (default: wrn16-1)")
    parser.add_argument("--batch", type=int, default=128, help="images per step (default: 128)")
    parser.add_argument("--steps", type=int, default=5, help="student steps per iteration, k (default: 5)")
    parser.add_argument("--repeats", type=int, default=5, help="timed iterations of each (default: 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="ours (default: fp32)")
    parser.add_argument("--plain-precision", choices=["fp32", "bf16"], default="fp32", help="of the plain loop")
    parser.add_argument("--json", type=Path, help="write the record there")
    args = parser.parse_args()
    record = measure(args)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    ratio, share = record["ratio"], record["share_of_floor"]
    print(f"ratio {ratio:.2f} x of the plain loop, {100 * share:.0f} % of the operation floor")


if __name__ == "__main__":
    main()
