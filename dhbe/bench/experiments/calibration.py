"""Ours: anomalies of clean and backdoored classifiers, on which `dhbe scan` is calibrated."""

from dhbe.bench import SMOKE, Case, Experiment, Grid, Scale, planted, scanned

NETS = ("resnet8", "wrn16-1", "flat", "plain", "layered")
FITS = {
    "digits": {"epochs": 12, "batch": 32, "lr": 0.05, "crop": 0, "flip": False},
    "cifar10": {"epochs": 6, "batch": 64, "lr": 0.05, "crop": 0, "flip": False},
    "augmented": {"epochs": 6, "batch": 64, "lr": 0.05},
}
"""Training without crops and flips, as few epochs with them plant no small patch in a network that pools."""
ATTACKS = {
    "clean": ("none", {}),
    "checkerboard3": ("badnets", {"side": 3, "rate": 0.1}),
    "random5": ("badnets", {"side": 5, "style": "random", "place": "10,12", "rate": 0.1}),
    "white4": ("badnets", {"side": 4, "style": "white", "place": "top-left", "rate": 0.1}),
    "blend": ("blend", {"alpha": 0.2, "rate": 0.1}),
    "sig": ("sig", {"delta": 40, "share": 0.5}),
    "trojaning5": ("trojaning", {"side": 5, "steps": 200, "tune_epochs": 4}),
    "lsb": ("lsb", {"bits": 3, "rate": 0.1}),
}
IMAGES = 8000
"""Number of CIFAR-10 images for one classifier."""
Plan = tuple[str, str, str, int]
"""Attack, network, data and seed, which determines the target class."""
PLANS: list[Plan] = [
    *(("clean", net, "digits", 0) for net in NETS),
    *(("clean", net, "augmented", 1) for net in NETS),
    *(("clean", net, "digits", 2) for net in ("resnet8", "flat", "plain")),
    *(("checkerboard3", net, "augmented" if net == "flat" else "cifar10", 11) for net in NETS),
    *(("clean", net, "cifar10", 3) for net in ("resnet8", "flat", "plain")),
    ("random5", "resnet8", "digits", 12), ("random5", "wrn16-1", "cifar10", 13), ("random5", "plain", "cifar10", 14),
    ("white4", "flat", "digits", 15), ("white4", "layered", "cifar10", 16), ("white4", "flat", "cifar10", 17),
    ("blend", "resnet8", "cifar10", 18), ("blend", "flat", "digits", 19), ("sig", "resnet8", "cifar10", 21),
    ("trojaning5", "wrn16-1", "digits", 22), ("lsb", "resnet8", "cifar10", 23), ("checkerboard3", "resnet8", "digits", 24),
]  # fmt: skip


def victim(plan: Plan, scale: Scale) -> Case:
    """One classifier of the set."""
    attack, net, data, seed = plan
    (name, how), tiny = ATTACKS[attack], scale is SMOKE
    arch = f"dhbe.bench.networks:{net}" if net in ("flat", "plain", "layered") else net
    return planted(
        name, how if attack == "clean" else {**how, **(scale.attacks.get(name, {}) if tiny else {}), "target": 3 * seed % 10},
        data="digits" if tiny or data == "digits" else "cifar10", arch=arch, fit=scale.fit if tiny else FITS[data],
        images=scale.images if tiny else None if data == "digits" else IMAGES, tested=scale.tested, seed=seed, minutes=0.05 if tiny else 4,
    )  # fmt: skip


def cases(scale: Scale) -> list[Case]:
    """A scan of each classifier, half of which are backdoored; at the scale smoke, of every eighth."""
    survey = scale.budgets.get("scan", {})
    return [
        scanned(
            victim(plan, scale),
            survey,
            minutes=0.05 if scale is SMOKE else 2,
            victim=" ".join(map(str, plan)),
            backdoor=plan[0] != "clean",
        )
        for plan in PLANS[:: 8 if scale is SMOKE else 1]
    ]


EXPERIMENT = Experiment(
    title="Calibration: how far classes stand out",
    cases=cases,
    draw=[Grid(rows=("victim",), values=("anomaly_index", "suspected_class", "probability", "evidence", "seconds"))],
    note="`python -m experiments.calibration` of a clone tells what one half of such a set says of the other.",
)
