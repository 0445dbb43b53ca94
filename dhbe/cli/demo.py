"""`dhbe demo`: plants a backdoor in a small network for handwritten digits and erases it."""

from collections.abc import Sequence
from pathlib import Path

from dhbe import api, runs, suspects
from dhbe.attacks import BadNets
from dhbe.cli import arguments, codes, shown
from dhbe.cli.parser import Parser
from dhbe.data import load
from dhbe.defenses import PRESETS
from dhbe.progress import Progress
from dhbe.training import Fit


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns the exit code: 1 if the backdoor still answers."""
    args = parser().parse_args(argv)
    train, test = load("digits16", "train"), load("digits16", "test")
    how = BadNets(side=3, rate=0.1)
    fit = Fit(epochs=8, batch=32, crop=0, flip=False)  # flipped digits are not digits
    victim = args.out / runs.PLANTED
    shown.tell(
        args, f"1/2 planting a backdoor: {len(train)} images of digits, {how.rate:.0%} with a 3 x 3 checkerboard -> 9"
    )
    with Progress(fit.epochs, "training a backdoored ResNet-8", args.quiet) as progress:
        api.attack(
            how, train, test, arch="resnet8", out=victim, data="digits16", fit=fit, seed=args.seed, device=args.device,
            resume=args.resume, overwrite=not args.resume, watch=progress.epoch, command=args.command,
        )  # fmt: skip
    suspect = suspects.load(victim / api.BACKDOORED)
    evidence = api.Evidence(test, "digits16", how.trigger_for(test.shape), how.target_in(test.classes))
    defense = PRESETS["fast"]
    shown.tell(args, "2/2 erasing it: from here on, images and trigger are used only to measure")
    with Progress(defense.rounds, "erasing", args.quiet, folder=args.out) as progress:
        record = api.erase(
            suspect, defense=defense, seed=args.seed, device=args.device, precision=args.precision, evidence=evidence,
            out=args.out, resume=args.resume, overwrite=not args.resume, watch=progress.round_info, parts=progress.part,
            command=args.command,
        ).record  # fmt: skip
    shown.erased(args, record, args.out)
    return codes.of(record.verdict)


def parser() -> Parser:
    """The verb's options."""
    parser = Parser(
        "demo",
        "  dhbe demo\n  dhbe demo --out here --seed 1",
        description="Plants a backdoor in a small network for handwritten digits, then erases it without data.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument(
        "--resume", action="store_true", help="resume the interrupted demo in --out, instead of starting over"
    )
    arguments.add_machine(parser)
    arguments.add_output(parser)
    return parser
