"""How long the first answer takes: `dhbe --help`, `import dhbe` and `dhbe doctor --json`, each in fresh processes.

`import dhbe` and `dhbe --help` must not load torch, or this fails. The targets hold on a quiet machine.

    python -m timings.startup
    python -m timings.startup --repeats 20 --note "nothing else running" > startup.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "dhbe --help": ["-m", "dhbe", "--help"],
    "import dhbe": ["-c", "import dhbe"],
    "dhbe doctor --json": ["-m", "dhbe", "doctor", "--json"],
}
TARGETS = {"dhbe --help": 0.5, "import dhbe": 0.2}
"""Seconds, at most."""

LOADED = "import sys, dhbe; from dhbe.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"


def seconds(arguments: list[str]) -> float:
    """Wall time of one process of this Python."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)  # noqa: S603 (our own commands)
    return time.perf_counter() - began


def measure(repeats: int) -> dict[str, dict[str, object]]:
    """Times of each command, in turns, after one call of each, which fills the caches."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repeat in range(repeats + 1):
        for name, arguments in COMMANDS.items():
            taken = seconds(arguments)
            if repeat:
                times[name].append(taken)
    found: dict[str, dict[str, object]] = {}
    for name, values in times.items():
        middle, target = statistics.median(values), TARGETS.get(name)
        found[name] = {"seconds": values, "median": middle, "target": target}
        if target:
            found[name]["met"] = middle < target
    return found


def main() -> None:
    """Reads the options, measures, prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10, help="timed processes of each (default: 10)")
    parser.add_argument("--note", default="", help="what else the machine was doing, for the record")
    args = parser.parse_args()
    if subprocess.run([sys.executable, "-c", LOADED], stdout=subprocess.DEVNULL).returncode:  # noqa: S603
        sys.exit("import dhbe, or dhbe --help, loads torch")
    print(json.dumps({"repeats": args.repeats, "note": args.note, "commands": measure(args.repeats)}, indent=1))


if __name__ == "__main__":
    main()
