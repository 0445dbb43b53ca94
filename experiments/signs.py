"""Do data-free signs correlate with measurements on data? Every check of a run is measured on test images.

    python -m experiments.signs run      # results/signs/VICTIM_SEED.json; what is there is left alone
    python -m experiments.signs table    # rank correlations, and the state that was kept beside the best one

CIFAR-10 is read from $DHBE_DATA or downloaded; the first 2000 test images measure. On none of the victims was a
setting sought.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from scipy.stats import spearmanr

from dhbe import api, data
from dhbe.api import machine
from dhbe.bench import pages
from dhbe.defenses import FastDHBE, RoundInfo
from experiments import victims

RESULTS = victims.ROOT / "results" / "signs"
HEADS = ("victim", "looks", "agreement and ACC", "gain and ASR", "kept: ACC, ASR %", "best: ACC, ASR %")
VICTIMS, SEEDS, TESTED = ("badnets-5", "blend"), (0,), 2000


@dataclass(frozen=True)
class Look:
    """One check of the student: its signs, and the rates that they estimate."""

    round: int
    agreement: float
    gain: float
    acc: float
    asr: float


def run(victim: str, seed: int) -> dict[str, object]:
    """All checks of one run with the default settings, and the measures of the state that it kept."""
    suspect, evidence = victims.load(victim, data.load(victims.DATA, "test").subset(slice(TESTED)))
    fast, looks = FastDHBE(), list[Look]()

    def look(round_info: RoundInfo) -> None:
        past = round_info.number - round_info.run_state.part("findings").rounds
        if past <= 0 or past % fast.look_every:
            return
        measured = api.measured(round_info.model, evidence)
        signs = {name: float(round_info.round[name]) for name in ("agreement", "gain")}
        looks.append(Look(past, **signs, acc=measured.acc or 0.0, asr=measured.asr or 0.0))

    after = api.erase(suspect, defense=fast, seed=seed, evidence=evidence, watch=look).record.after
    assert after is not None
    return {"looks": [asdict(each) for each in looks], "kept": {"acc": after.acc, "asr": after.asr}, "n": TESTED}


def table(folder: Path) -> str:
    """A row for each run."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text())
        looks, kept = [Look(**each) for each in told["looks"]], told["kept"]
        best = max(looks, key=lambda each: each.acc - each.asr)
        ranks = [
            spearmanr([getattr(each, sign) for each in looks], [getattr(each, rate) for each in looks]).statistic
            for sign, rate in (("agreement", "acc"), ("gain", "asr"))
        ]
        cells = [path.stem.replace("_", ", seed "), str(len(looks)), *(f"{rank:.2f}" for rank in ranks)]
        cells += [f"{100 * kept['acc']:.1f}, {100 * kept['asr']:.1f}", f"{100 * best.acc:.1f}, {100 * best.asr:.1f}"]
        rows.append(cells)
    return pages.table(HEADS, rows)


def tables() -> dict[str, str]:
    """That of docs/method.md."""
    return {"experiments/signs.py": table(RESULTS)}


def main() -> None:
    """Runs the cases without a record, or prints the table."""
    if sys.argv[1] == "table":
        print("\n\n".join(tables().values()))
        return
    machine.keep_memory()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        for victim in VICTIMS:
            out = RESULTS / f"{victim}_{seed}.json"
            if not out.exists():
                out.write_text(json.dumps(run(victim, seed), indent=1) + "\n")
                print(out.stem, flush=True)


if __name__ == "__main__":
    main()
