"""Peak memory of a whole erasure against its minimum: weights, optimiser and one student step.

Counted are the bytes of tensors, each time torch takes or returns some; the target is 1.3. Each runs in a process of its
own. Libraries, and what a process keeps of freed memory, are not counted: both have them alike.

    python -m timings.memory
    python -m timings.memory --arch resnet18-w16 --precision bf16 --json memory.json
    python -m timings.memory table    # of docs/performance.md, from results/memory/
"""

import argparse
import json
import multiprocessing
import sys
from itertools import accumulate
from pathlib import Path

import torch
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile

from dhbe import networks
from dhbe.bench import pages
from dhbe.classifier import Classifier
from dhbe.defenses import FastDHBE
from dhbe.search.photographs import pieces
from dhbe.search.survey import Survey
from dhbe.steps import channels_last, computing, descend, gap
from experiments import ROOT
from timings.iteration import CHANNELS, CLASSES, MEAN, SIDE, STD, machine


def victim(arch: str, device: str) -> Classifier:
    """A fresh network after one warm-up pass; the photographs are in memory as well."""
    torch.manual_seed(0)
    network = networks.build(arch, CLASSES, (CHANNELS, SIDE, SIDE))
    model = Classifier(network, shape=(CHANNELS, SIDE, SIDE), classes=CLASSES, mean=MEAN, std=STD).to(device)
    model.eval()(pieces(1, model.shape).to(device))
    return model


def step(model: Classifier, batch: int, device: str, precision: str) -> None:
    """Two student steps: the second has the optimiser's momentum."""
    channels_last(model)
    learn = SGD(model.parameters(), 0.005, momentum=0.9, fused=True)
    pixels = torch.rand(batch, CHANNELS, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last)
    with computing(torch.device(device), "bf16" if precision == "bf16" else "fp32"):
        for _ in range(2):
            descend(learn, gap(model(pixels), torch.zeros(batch, CLASSES, device=device)))


def erasure(model: Classifier, batch: int, device: str, precision: str) -> None:
    """A run with all its phases, but fewer rounds than by default, as all rounds are alike."""
    fast = FastDHBE(batch=batch, iterations=2, cycles=1, survey=Survey(warm_up=2, search_batch=batch))
    fast(model, precision="bf16" if precision == "bf16" else "fp32")


WORKS = {"step": step, "erasure": erasure}


def peak(name: str, arch: str, batch: int, device: str, precision: str) -> int:
    """Peak bytes of the tensors of a piece of work, without those of the network itself."""
    model = victim(arch, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WORKS[name](model, batch, device, precision)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        WORKS[name](model, batch, device, precision)
    events = watched.profiler.kineto_results.events()  # type: ignore[union-attr]  # the only place that tells the order
    moves = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in moves))


def table(folder: Path) -> str:
    """A row for each record."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text())
        settings, sizes = told["settings"], (f"{told['bytes'][name] / 2**20:.1f}" for name in WORKS)
        where = settings["device"] if settings["device"] == "cpu" else told["machine"]["device"]
        rows.append((settings["arch"], where, settings["precision"], *sizes, f"{told['peak_ratio']:.2f}"))
    return pages.table(("network", "on", "precision", "one student step, MiB", "a run, MiB", "ratio"), rows)


def tables() -> dict[str, str]:
    """That of docs/performance.md."""
    return {"timings/memory.py": table(ROOT / "results" / "memory")}


def main() -> None:
    """Reads the options, measures both, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="wrn16-1", help="network (default: wrn16-1)")
    parser.add_argument("--batch", type=int, default=128, help="images per step (default: 128)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: fp32")
    parser.add_argument("--json", type=Path, help="write the record there")
    args = parser.parse_args()
    found = {}
    for name in WORKS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(peak, (name, args.arch, args.batch, args.device, args.precision))
        print(f"{name:8} {found[name] / 2**20:.1f} MiB")
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
    if "table" in sys.argv[1:2]:
        print("\n\n".join(tables().values()))
    else:
        main()
