"""Peak memory of a whole erasure beside that of what it cannot do without: weights, optimiser and one student step.

Each runs in a process of its own; what a process holds before it begins (Python, libraries, the network, two photographs) is not counted. The
target is 1.3. On a CPU the peak is that of the process, on a GPU what torch allocated.

    python benchmarks/memory.py
    python benchmarks/memory.py --arch resnet18-w16 --precision bf16 --json memory.json
"""

import argparse
import json
import multiprocessing
import resource
from pathlib import Path

import torch
from iteration import CHANNELS, CLASSES, MEAN, SIDE, STD, machine
from torch.optim import SGD

from dhbe import networks
from dhbe.api.machine import keep_memory
from dhbe.classifier import Classifier
from dhbe.defenses import FastDHBE
from dhbe.defenses.base import computing
from dhbe.defenses.parts import channels_last, descend, gap
from dhbe.defenses.photographs import pieces


def victim(arch: str, device: str) -> Classifier:
    """A fresh network, which has used its kernels once."""
    torch.manual_seed(0)
    network = networks.build(arch, CLASSES, (CHANNELS, SIDE, SIDE))
    model = Classifier(network, shape=(CHANNELS, SIDE, SIDE), classes=CLASSES, mean=MEAN, std=STD).to(device)
    model.eval()(pieces(1, model.shape).to(device))
    return model


def peak(device: str) -> int:
    """Bytes, of this process or of the device."""
    if device == "cpu":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return torch.cuda.max_memory_allocated()


def step(arch: str, batch: int, device: str, precision: str) -> int:
    """Bytes that two student steps need: the second with the optimiser's momentum."""
    keep_memory()
    model = victim(arch, device)
    before = peak(device)
    channels_last(model)
    learn = SGD(model.parameters(), 0.005, momentum=0.9, fused=True)
    pixels = torch.rand(batch, CHANNELS, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last)
    with computing(torch.device(device), "bf16" if precision == "bf16" else "fp32"):
        for _ in range(2):
            descend(learn, gap(model(pixels), torch.zeros(batch, CLASSES, device=device)))
    return peak(device) - before


def erasure(arch: str, batch: int, device: str, precision: str) -> int:
    """Bytes that a run with all its parts needs; fewer rounds than by default, for all of them are alike."""
    keep_memory()
    model = victim(arch, device)
    before = peak(device)
    fast = FastDHBE(batch=batch, warm_up=3, iterations=5, cycles=1)
    fast(model, precision="bf16" if precision == "bf16" else "fp32")
    return peak(device) - before


def main() -> None:
    """Reads the options, measures both, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="wrn16-1", help="network (default: wrn16-1)")
    parser.add_argument("--batch", type=int, default=128, help="images per step (default: 128)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: fp32")
    parser.add_argument("--json", type=Path, help="write the record there")
    args = parser.parse_args()
    asked = (args.arch, args.batch, args.device, args.precision)
    found = {}
    for work in (step, erasure):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[work.__name__] = pool.apply(work, asked)
        print(f"{work.__name__:8} {found[work.__name__] / 2**20:.0f} MiB")
    ratio = found["erasure"] / found["step"]
    print(f"ratio {ratio:.2f}")
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        record = {
            "settings": settings,
            "machine": machine(torch.device(args.device)),
            "bytes": found,
            "peak_ratio": ratio,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
