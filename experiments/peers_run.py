"""Runs every defence on victims of `zoo/` and writes results/peers/VICTIM_DEFENCE_SEED.json; what is there is left alone.

CIFAR-10 is read from $DHBE_DATA or downloaded. A defence that needs clean images is lent 2000 of the training images,
others for each seed; all is measured on the test images. An interrupted run goes on from --work, where finished ones
wait to be measured again on more images.

    python -m experiments.peers_run
    python -m experiments.peers_run --only clp dhbe --victims badnets-3 --seeds 0
"""

import argparse
import copy
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dhbe import api, data, records, suspects
from dhbe.attacks.triggers import parse
from dhbe.data import Images, clean_subset
from dhbe.defenses import PEERS
from dhbe.evaluation.measuring import rated
from dhbe.records import Measures, Record
from experiments import missing

ROOT = Path(__file__).resolve().parents[1]
DATA, LENT = "cifar10", 2000
VICTIMS = ("badnets-3", "trojaning-5")

BUDGET: dict[str, dict[str, Any]] = {
    "mcr": {"epochs": 20},
    "gdm": {"search_epochs": 6},
    "dfad": {"iterations": 40, "batch": 64, "lr": 0.01},
    "abd": {"iterations": 40, "batch": 64, "lr": 0.01},
    "otbr": {"steps": 100},
    "inversion": {"batches": 2, "steps": 100, "epochs": 30, "lr": 0.01},
}
"""What differs from the defaults, so that all fits into hours on a CPU: fixed before any run, the same for all of them.

What distils has a tenth of its rate: a student that starts as a copy and leaves it at 0.1 needs far more rounds to
come back.
"""


@dataclass(frozen=True, eq=False)
class Case:
    """One run, and the victim's measures, which are the same for all runs on it."""

    victim: str
    defense: str
    seed: int
    clean: Images
    test: Images
    before: Measures

    @property
    def name(self) -> str:
        return f"{self.victim}_{self.defense}_{self.seed}"


def load(victim: str, test: Images) -> tuple[suspects.Suspect, api.Evidence]:
    """A victim of the zoo, and what it is measured with."""
    suspect, planted = suspects.load(ROOT / f"zoo/{victim}.safetensors"), records.read(ROOT / f"zoo/{victim}.json")
    trigger = parse(str(ROOT / f"zoo/{victim}.trigger.json"), suspect.info.input)
    return suspect, api.Evidence(test, DATA, trigger, planted.target)


def run(case: Case, work: Path) -> Record:
    """The record of one case."""
    suspect, evidence = load(case.victim, case.test)
    how: dict[str, Any] = {"seed": case.seed, "out": work / case.name, "resume": True}
    if case.defense in PEERS:
        defense = PEERS[case.defense](**BUDGET.get(case.defense, {}))
        lent = {"clean": case.clean, "source": DATA, "images": LENT, "target": evidence.one_target}
        done = api.defend(suspect, defense, **lent, **how)
    else:
        done = api.erase(suspect, **how)
    cleaned = copy.deepcopy(suspect.classifier)
    cleaned.network = done.model
    found, left = (measures.signs if measures else {} for measures in (done.record.before, done.record.after))
    before = case.before.model_copy(update={"signs": found})
    # Who is right in the victim's eyes is not looked at here: one more pass over the images.
    after = api.measured(cleaned, evidence, signs=left).model_copy(update={"asr_victim": None})
    return done.record.model_copy(
        update={
            "model": suspect.info.model_copy(update={"path": f"{case.victim}.safetensors"}),
            "data": DATA, "trigger": evidence.trigger and evidence.trigger.name, "target": evidence.one_target,
            "before": before, "after": rated(before, after),
        }
    )  # fmt: skip


def without_record(victims: list[str], names: list[str], seeds: list[int], tested: int, out: Path) -> Iterator[Case]:
    """What has no record yet, a seed at a time, so that whatever is done is a whole column."""
    train, test = data.load(DATA, "train"), data.load(DATA, "test").subset(slice(tested))
    before: dict[str, Measures] = {}
    for seed in seeds:
        lent = clean_subset(train, LENT, seed)
        for victim in victims:
            for name in names:
                if (out / f"{victim}_{name}_{seed}.json").exists():
                    continue
                if victim not in before:
                    suspect, evidence = load(victim, test)
                    before[victim] = api.measured(suspect.classifier, evidence)
                yield Case(victim, name, seed, lent, test, before[victim])


def main() -> None:
    """Reads the options, and runs each case in a process of its own, whose peak memory is then its own too."""
    every = [*PEERS, "dhbe"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--victims", nargs="+", default=list(VICTIMS), help=f"default: {' '.join(VICTIMS)}")
    parser.add_argument("--only", nargs="+", default=every, choices=every, help="defences (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--tested", type=int, default=10_000, help="test images, the first ones (default: 10000, all)")
    parser.add_argument("--out", type=Path, default=ROOT / "results/peers", help="folder of the records")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"), help="folder of the runs under way")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as workers:
        cases = without_record(args.victims, args.only, args.seeds, args.tested, args.out)
        missing.run(
            ((case.name, lambda case=case: workers.submit(run, case, args.work).result()) for case in cases),
            args.out,
            brief=False,
        )


if __name__ == "__main__":
    main()
