"""The entry point: dispatches the verb, and turns errors into one line and an exit code."""

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from dhbe.cli import absent, shown
from dhbe.cli.codes import DONE, FAILED, INTERRUPTED, USAGE
from dhbe.cli.parser import configured, meant
from dhbe.errors import Failed, Interrupted, Refused, out_of_memory

VERBS = {
    "erase": "remove the backdoor from a classifier; no data needed",
    "scan": "search a model for a backdoor; no data needed",
    "verify": "search a model before and after a defence to see whether the backdoor is gone; no data needed",
    "score": "measure ACC and ASR of a model on data",
    "attack": "train a backdoored classifier to practise on",
    "defend": "run a defence of other authors, for comparison or to use clean images",
    "compare": "run several defences on one model and write one report",
    "bench": "run experiments, of the paper or your own, and draw their tables and figures",
    "resume": "resume the interrupted run in a folder",
    "demo": "plant a backdoor in a small network for handwritten digits and erase it",
    "doctor": "show what this machine offers, and whether the installation works",
    "completion": "print a completion script for bash, zsh or another shell",
}
"""Summary of each verb; a verb is a module of this package with a function `run`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _obey(words)
        sys.stdout.flush()
        return code
    except Refused as error:
        return shown.said(error.flagged, USAGE)
    except Failed as error:
        return shown.said(error.flagged, FAILED)
    except Interrupted as error:
        return shown.said(f"{error}; {_again(words)}", INTERRUPTED)
    except KeyboardInterrupt:
        return shown.said("interrupted", INTERRUPTED)
    except OSError as error:  # mostly from our output: a closed pipe or a full disk
        _give_up_output()
        if isinstance(error, BrokenPipeError):
            return DONE
        place = f"{error.filename}: " if error.filename else ""
        return shown.said(f"{place}{(error.strerror or type(error).__name__).lower()}", FAILED)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        batch = "--search-batch" if words[0] in ("scan", "verify") else "--batch"
        return shown.said(f"out of memory: lower {batch}", FAILED)


def _obey(given: list[str]) -> int:
    verb, *rest = given or ["--help"]
    if verb in ("-h", "--help"):
        print(_overview())
        return DONE
    if verb == "--version":
        from importlib.metadata import version

        print(f"dhbe {version('dhbe')}")
        return DONE
    if verb not in VERBS:
        raise Refused(f"no verb {verb!r}{meant(verb, VERBS)}; available: {', '.join(VERBS)} (see dhbe --help)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of libraries are not for users of a command
        try:
            if absent.wanted(verb, rest):
                with absent.others():
                    return import_module(f"dhbe.cli.{verb}").run(configured(rest))
            module = import_module(f"dhbe.cli.{verb}")
            import_module("dhbe.api.machine").keep_memory()
            return module.run(configured(rest))
        except SystemExit:  # argparse has printed its help
            return DONE


def _again(words: Sequence[str]) -> str:
    """The command that resumes an interrupted run.

    >>> _again(["erase", "a.pt", "--overwrite"])
    'to resume: dhbe erase a.pt --resume'
    """
    again = [word for word in words if word not in ("--resume", "--overwrite")]
    return f"to resume: {shlex.join(['dhbe', *again, *([] if words[0] == 'bench' else ['--resume'])])}"


def _give_up_output() -> None:
    """Prevents further errors about unwritable output when Python exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _overview() -> str:
    lines = [f"  {name:10} {what}" for name, what in VERBS.items()]
    return "\n".join(
        [
            "usage: dhbe VERB ... (see dhbe VERB --help)",
            "",
            "Erase backdoors from image classifiers without data.",
            "",
            *lines,
            "",
            "examples:",
            "  dhbe demo",
            "  dhbe scan vendor.pt --arch resnet18 --classes 10 --mean cifar10",
            "  dhbe erase vendor.pt --arch resnet18 --classes 10 --mean .491 .482 .447 --std .247 .243 .262",
            "  dhbe score clean.safetensors --data test.npz --trigger badnets:3 --target 9",
            "",
            "exit codes: 0 done; 1 a backdoor was found or remains, or a gate failed; 2 wrong usage or input refused;\n3 unclear, label contradicted, or input not usable (--fail-on found: 0); 4 failed;\n"
            "130 interrupted (erase, scan, verify, defend, attack and demo save their state)",
        ]
    )
