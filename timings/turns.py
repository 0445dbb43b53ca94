"""What the benchmarks of ours against a plain loop share: works in turns, and the ratio of their times."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from timings.iteration import machine

Work = Callable[[], object]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def in_turns(both: dict[str, Work], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each work, called in turns after one call of each, and first in every other turn."""
    for work in both.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in both}
    for repeat in range(repeats):
        for name in list(both)[:: 1 if repeat % 2 else -1]:
            began = clock()
            both[name]()
            times[name].append(clock() - began)
    return times


def ratios(times: dict[str, list[float]]) -> list[float]:
    """How many times as long as ours the plain loop took, turn by turn."""
    return [plain / ours for ours, plain in zip(times["ours"], times["plain"], strict=True)]


def spread(values: Sequence[float], unit: str) -> str:
    """Median and range in a few words.

    >>> spread([1.0, 4.0, 2.0], " s")
    'median 2.0000 s, from 1.0000 to 4.0000 s'
    """
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"median {middle:.4f}{unit}, from {low:.4f} to {high:.4f}{unit}"


def arguments(about: str, **numbers: int) -> argparse.Namespace:
    """Options of a benchmark: what all have, and numbers with their defaults."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--arch", default="wrn16-1", help="network (default: wrn16-1)")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu on a busy machine (default: wall)")
    parser.add_argument("--note", default="", help="what else the machine was doing, for the record")
    parser.add_argument("--json", type=Path, help="write the record there")
    return parser.parse_args()


def compare(args: argparse.Namespace, both: dict[str, Work]) -> None:
    """Measures, prints, and writes the record if that was asked for."""
    times = in_turns(both, args.repeats, CLOCKS[args.clock])
    found = ratios(times)
    for name, values in times.items():
        print(f"{name:6} {spread(values, ' s')}")
    print(f"ratio  {spread(found, ' x')}")
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        record = {"settings": settings, "machine": machine(torch.device("cpu")), "seconds": times, "ratios": found}
        args.json.write_text(json.dumps({**record, "ratio": statistics.median(found)}, indent=1) + "\n")
