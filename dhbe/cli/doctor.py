"""`dhbe doctor`: shows what this machine offers, and whether the installation works."""

import importlib.util
import json
import sys
import time
from collections.abc import Sequence

from dhbe.cli.codes import DONE
from dhbe.cli.parser import Parser


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code."""
    args = parser().parse_args(argv)
    print("checking this machine with a trial run; this takes a few seconds", file=sys.stderr, flush=True)
    found = _found()
    print(json.dumps(found) if args.json else "\n".join(f"{name:12} {what}" for name, what in found.items()))
    return DONE


def parser() -> Parser:
    """The verb's options."""
    parser = Parser(
        "doctor", "  dhbe doctor", description="Shows what this machine offers, and whether dhbe works on it."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def _found() -> dict[str, str | int]:
    import torch

    from dhbe import networks
    from dhbe.api import machine
    from dhbe.classifier import Classifier
    from dhbe.defenses import FastDHBE
    from dhbe.search.survey import Survey

    found: dict[str, str | int] = {**machine.versions()}
    found["threads"] = torch.get_num_threads()
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found["bf16"] = (
        "yes" if machine.precision("auto", machine.device("auto"), exact=False) == "bf16" else "no (slow here)"
    )
    for extra in ("torchvision", "timm", "transformers", "onnxruntime", "tensorboard"):
        found[extra] = "yes" if importlib.util.find_spec(extra) else "no"
    network = networks.build("resnet8", 2, (3, 16, 16))  # with two classes none stands out, so the search is short
    began = time.monotonic()
    trial = FastDHBE(iterations=1, cycles=1, batch=16, survey=Survey(warm_up=1, pool_size=64))
    trial(Classifier(network, shape=(3, 16, 16), classes=2))
    found["trial run"] = f"works, {time.monotonic() - began:.1f} s"
    old = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 13)
    if old:
        found["advice"] = (
            "torch is older than 2.13; its restricted loader has known weaknesses: update before opening untrusted files"
        )
    return found
