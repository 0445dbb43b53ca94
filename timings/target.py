"""Time to a quality target, ASR of 2 % at the most and 1 point of accuracy lost at the most: ours against the plain loop.

Both start from the same victim in one process, in turns, seed by seed. Ours is `fast`: the seconds until the first look at
which the target holds, and until its end. The plain loop is that of `iteration.py`, with the settings of the released
script; it is given up after so many times as long as ours, for its 15,000 iterations take a day here. The clock stands
still while test images measure.

    python -m timings.target
    python -m timings.target --victim argd --patience 10 --json results/target/argd.json
    python -m timings.target table    # of docs/performance.md, from results/target/
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dhbe import api, data
from dhbe.api.machine import keep_memory, precision
from dhbe.bench import pages
from dhbe.classifier import Classifier, evaluating, logits_in
from dhbe.defenses import PRESETS, RoundInfo
from dhbe.suspects import Suspect
from experiments import ROOT, victims
from timings.iteration import machine, plain

MOST_ASR, MOST_LOST = 0.02, 0.01
EVERY = 5
"""Rounds or iterations between two looks."""


@dataclass
class Reached:
    """How far a run came."""

    seconds: float
    """Until the target was reached, or until the run ended or was given up."""
    reached: bool
    acc: float
    asr: float
    whole: float | None = None
    """Seconds until the end of a run that ends by itself."""
    end_acc: float | None = None
    end_asr: float | None = None

    def told(self) -> str:
        """In a few words."""
        rates = f"ACC {100 * self.acc:.1f}, ASR {100 * self.asr:.1f}"
        return f"{self.seconds:.0f} s ({rates})" if self.reached else f"not in {self.seconds:.0f} s ({rates})"


class Clock:
    """A clock that stands still while something is measured; it stops when the target is reached."""

    def __init__(self, evidence: api.Evidence, acc: float) -> None:
        self._evidence, self._acc = evidence, acc
        self._began, self._out = time.perf_counter(), 0.0
        self.found = Reached(0.0, False, acc, 1.0)

    def seconds(self) -> float:
        return time.perf_counter() - self._began - self._out

    def look(self, model: Classifier) -> None:
        """Measures, unless the target was reached before."""
        if self.found.reached:
            return
        now, before = self.seconds(), time.perf_counter()
        with evaluating(model):
            found = api.measured(model, self._evidence)
        acc, asr = found.acc or 0.0, found.asr if found.asr is not None else 1.0
        self.found = Reached(now, asr <= MOST_ASR and self._acc - acc <= MOST_LOST, acc, asr)
        self._out += time.perf_counter() - before


def ours(suspect: Suspect, evidence: api.Evidence, acc: float, seed: int) -> Reached:
    """`fast`, as it comes."""
    clock = Clock(evidence, acc)

    def watch(round_info: RoundInfo) -> None:
        if "agreement" in round_info.round and round_info.number % EVERY == 0:
            clock.look(round_info.model)

    cleaned = PRESETS["fast"](
        suspect.classifier, seed=seed, precision=precision("auto", torch.device("cpu"), exact=False), watch=watch
    )
    clock.found.whole = clock.seconds()
    end = api.measured(cleaned, evidence)
    clock.found.end_acc, clock.found.end_asr = end.acc, end.asr
    return clock.found


class Logits(nn.Module):
    """A network that returns its logits alone, as the script expects."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return logits_in(self.network(x))


def theirs(suspect: Suspect, evidence: api.Evidence, acc: float, seed: int, limit: float) -> Reached:
    """The plain loop, in fp32, at the batch and k of the released script."""
    torch.manual_seed(seed)
    info = suspect.info
    iterate, student = plain(
        Logits(suspect.classifier.network), 256, 5, torch.device("cpu"), "fp32", tuple(info.mean), tuple(info.std)
    )
    model = Classifier(
        student, shape=info.input, classes=info.classes, mean=info.mean, std=info.std, softmax=info.softmax
    )
    clock, done = Clock(evidence, acc), 0
    while not clock.found.reached and clock.seconds() < limit:
        iterate()
        done += 1
        if done % EVERY == 0:
            clock.look(model)
    return clock.found


def ratio(own: Reached, other: Reached) -> str:
    """How many times as long the plain loop takes; at least so many where it was given up."""
    return f"{'' if other.reached else '> '}{other.seconds / own.seconds:.1f}" if own.reached else "—"


def table(folder: Path) -> str:
    """A row for each seed of each victim."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        for run in json.loads(path.read_text())["runs"]:
            own, other = (Reached(**run[name]) for name in ("ours", "plain"))
            told = (own.told(), f"{own.whole:.0f} s", other.told(), ratio(own, other))
            rows.append((f"{path.stem}, seed {run['seed']}", *told))
    return pages.table(("victim", "ours: the target", "its end", "plain loop: the target", "ratio"), rows)


def tables() -> dict[str, str]:
    """That of docs/performance.md."""
    return {"timings/target.py": table(ROOT / "results" / "target")}


def main() -> None:
    """Reads the options, runs both in turns, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--victim", default="clean-label-5", choices=[*victims.ZOO, "argd"], help="default: %(default)s"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--patience", type=float, default=3.0, help="of the plain loop, in times of ours (default: 3)")
    parser.add_argument("--tested", type=int, default=2000, help="test images that measure (default: 2000)")
    parser.add_argument("--json", type=Path, help="write the record there")
    args = parser.parse_args()
    keep_memory()
    suspect, evidence = victims.load(args.victim, data.load(victims.DATA, "test").subset(slice(args.tested)))
    before = api.measured(suspect.classifier.eval(), evidence)
    acc, runs = before.acc or 0.0, list[dict[str, object]]()
    for seed in args.seeds:
        own = ours(suspect, evidence, acc, seed)
        other = theirs(suspect, evidence, acc, seed, args.patience * (own.whole or own.seconds))
        print(f"seed {seed}, from ACC {100 * acc:.1f}, ASR {100 * (before.asr or 0):.1f}")
        print(
            f"ours   {own.told()}; its end after {own.whole:.0f} s: ACC {100 * (own.end_acc or 0):.1f}, ASR {100 * (own.end_asr or 0):.1f}"
        )
        print(f"plain  {other.told()}")
        print(f"ratio  {ratio(own, other)}", flush=True)
        runs.append({"seed": seed, "ours": asdict(own), "plain": asdict(other)})
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        record = {
            "settings": settings,
            "machine": machine(torch.device("cpu")),
            "acc": acc,
            "asr": before.asr,
            "runs": runs,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if "table" in sys.argv[1:2]:
        print("\n\n".join(tables().values()))
    else:
        main()
