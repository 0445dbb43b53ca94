"""The three scales of experiments, with their victims, defences and budgets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dhbe.bench.cases import Case, erased, planted

Settings = Mapping[str, Any]

PRESETS = ("fast", "paper", "official")
"""Presets of `dhbe erase`, which need no clean images."""


@dataclass(frozen=True)
class Scale:
    """Data, networks and budgets of a scale, and the values over which experiments vary."""

    name: str
    summary: str
    data: str
    arch: str
    fit: Settings
    """Training of a victim from scratch."""
    attacks: Mapping[str, Settings]
    """Settings of the attacks that differ from the paper's."""
    sizes: tuple[int, ...]
    """Sides of the square triggers, as in tables 3, 5 and 6."""
    dhbe: tuple[str, Settings]
    """The preset that represents DHBE, and settings that differ from it."""
    budgets: Mapping[str, Settings]
    """Settings of the other defences that differ from their defaults."""
    shares: Mapping[str, int]
    """Numbers of clean images for defences, by their share of the training images in the paper; the first is the default."""
    others: Mapping[str, tuple[str, Settings]]
    """Other data sets with their architecture and training."""
    archs: tuple[str, ...]
    targets: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    subsets: tuple[int, ...] = (0,)
    """Random subsets of clean images in figures 3 and 4."""
    rates: tuple[float, ...] = (0.002, 0.011, 0.02)
    """Learning rates in figures 3 and 4."""
    alphas: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()
    """Factors on DHBE's learning rates in figure 10."""
    patches: tuple[int, ...] = ()
    """Sides of the triggers in figure 11."""
    triggers: int = 3
    """Different square triggers in figures 6 and 9."""
    tuning: Settings | None = None
    """Training with which victims are fine-tuned from a clean model; None trains each from scratch."""
    plain: tuple[str, ...] = ()
    """Names of attacks that are fine-tuned without cropping and flipping."""
    images: int | None = None
    """Number of training images of a victim; None means all."""
    tested: int | None = None
    """Number of test images; None means all."""
    minutes: Mapping[str, float] = field(default_factory=dict)
    """Estimated durations of cases, by work or defence."""

    def clean(self, *, data: str | None = None, arch: str | None = None) -> Case:
        """A classifier without a backdoor."""
        return self._plant("none", {}, data or self.data, arch, self.fit, None, 0)

    def victim(
        self,
        attack: str,
        size: int | None = None,
        *,
        target: int = -1,
        data: str | None = None,
        arch: str | None = None,
        seed: int = 0,
        file: str | None = None,
        **settings: Any,
    ) -> Case:
        """A classifier with a backdoor.

        Args:
            attack: A name of `dhbe attack`, or a class in `file`.
            size: Side of its patch, for an attack that has one.
            target: The class that the trigger leads to.
            data: Another data set of `others`.
            arch: Another architecture.
            seed: Of everything random.
            file: Python code of the user's that defines the attack.
            **settings: Further ones of the attack.
        """
        how = {**self.attacks.get(attack, {}), **({"side": size} if size else {}), **settings}
        how |= {"target": target} if target != -1 else {}
        start, fit = None, self.fit
        if self.tuning:
            start = self.clean(data=data, arch=arch)
            fit = {**self.tuning, **({"crop": 0, "flip": False} if attack in self.plain else {})}
        return self._plant(attack, how, data or self.data, arch, fit, start, seed, file)

    def ours(self, victim: Case, /, *, seed: int = 0, changes: Settings | None = None, **labels: Any) -> Case:
        """DHBE at this scale, with some settings changed."""
        preset, settings = self.dhbe
        return erased(
            victim, preset, {**settings, **(changes or {})}, seed=seed, minutes=self._minutes("dhbe"), **labels
        )

    def theirs(
        self, victim: Case, defense: str, /, *, share: str = "", subset: int | None = None, seed: int = 0,
        changes: Settings | None = None, **labels: Any,
    ) -> Case:  # fmt: skip
        """Another defence, with that many clean images if it needs some; each seed has its own."""
        settings = {**self.budgets.get(defense, {}), **(changes or {})}
        lent = None if defense in PRESETS else self.shares[share or next(iter(self.shares))]
        return erased(
            victim, defense, settings, lent=lent, subset=seed if subset is None else subset, seed=seed,
            minutes=self._minutes(defense), **labels,
        )  # fmt: skip

    def by(self, victim: Case, defense: str, /, **more: Any) -> Case:
        """DHBE or another defence by name, labelled with it."""
        do = self.ours(victim, **more) if defense == "dhbe" else self.theirs(victim, defense, **more)
        return do.labelled(defense=defense)

    def _plant(
        self, attack: str, how: Settings, data: str, arch: str | None, fit: Settings, start: Case | None, seed: int,
        file: str | None = None,
    ) -> Case:  # fmt: skip
        usual, other = self.others.get(data, (self.arch, {}))
        return planted(
            attack, how, data=data, arch=arch or usual, fit={**fit, **other}, images=self.images, tested=self.tested,
            start=start, seed=seed, file=file, minutes=self._minutes("tune" if start else "plant"),
        )  # fmt: skip

    def _minutes(self, what: str) -> float:
        return self.minutes.get(what, self.minutes.get("defend", 1.0))


_PLAIN = {"crop": 0, "flip": False}
_FEW = {"epochs": 1, "size": 96, **_PLAIN}
_LOOK = {
    "warm_up": 1, "pool_size": 32, "judged_images": 16, "second_rounds": 0, "probe_images": 16, "search_batch": 64,
    "deep_images": 2, "deep_steps": 2, "swept_images": 1, "tried_images": 8, "tried_pieces": 1, "hunt_sides": [5],
    "hunt_pieces": 1, "scattered_steps": 1, "square_sides": [3],
}  # fmt: skip

SMOKE = Scale(
    name="smoke",
    summary="seconds a case: digits, ResNet-8, next to no rounds; figures mean nothing, the way to them is tried",
    data="digits16",
    arch="resnet8",
    fit={"epochs": 2, "batch": 32, "lr": 0.05, **_PLAIN},
    attacks={
        "badnets": {"rate": 0.1},
        "clean-label": {"rate": 0.05, "steps": 1, "proxy_epochs": 1, "proxy_steps": 1},
        "trojaning": {"steps": 2, "tune_epochs": 1},
        "sig": {"share": 0.5}, "blend": {"rate": 0.1}, "lsb": {"rate": 0.1},
    },
    sizes=(3, 5),
    dhbe=("paper", {"iterations": 2, "batch": 16}),
    budgets={
        "finetuning": _FEW, "fine-pruning": _FEW, "nad": {**_FEW, "teacher_epochs": 1}, "mcr": _FEW,
        "neural-cleanse": {**_FEW, "search_epochs": 1, "search_size": 16, "restarts": 1},
        "gdm": {**_FEW, "search_epochs": 1},
        "dfad": {"iterations": 2, "batch": 16}, "abd": {"iterations": 2, "batch": 16}, "otbr": {"steps": 2},
        "inversion": {"batches": 1, "steps": 2, "epochs": 1, "batch": 16},
        "fast": {"iterations": 1, "cycles": 1, "batch": 16, "lost_agreement": 0.0, **_LOOK}, "scan": _LOOK,
    },
    shares={"4 %": 64, "1 %": 32},
    others={"digits": ("resnet8", {"epochs": 1})},
    archs=("wrn16-1",),
    targets=(0,),
    rates=(0.002, 0.02),
    alphas=(0.0, 0.1),
    factors=(0.1, 1.0),
    patches=(3, 5),
    triggers=2,
    images=512,
    tested=96,
    minutes={"defend": 0.02, "dhbe": 0.02, "plant": 0.03},
)  # fmt: skip

SMALL = Scale(
    name="small",
    summary="minutes a case on two cores: CIFAR-10, ResNet-8, victims tuned from one clean model, DHBE by its preset fast",
    data="cifar10",
    arch="resnet8",
    fit={"epochs": 6, "lr": 0.2},
    tuning={"epochs": 2, "lr": 0.1},
    plain=("clean-label", "blend", "lsb", "refool", "wanet"),
    attacks={
        "badnets": {"rate": 0.05},
        "clean-label": {"rate": 0.04, "steps": 20, "proxy_epochs": 1, "proxy_steps": 1},
        "trojaning": {"steps": 500, "tune_epochs": 2},
        "blend": {"alpha": 0.2, "rate": 0.3}, "sig": {"delta": 40, "share": 0.5}, "lsb": {"bits": 4, "text": "?", "rate": 0.1},
        "refool": {"style": "ghost", "transmission": 0.4, "share": 0.8},
        "wanet": {"strength": 2.0, "rate": 0.2, "noise_rate": 0.1},
    },
    sizes=(3, 5, 7),
    dhbe=("fast", {}),
    budgets={
        "mcr": {"epochs": 20},
        "gdm": {"search_epochs": 6},
        "dfad": {"iterations": 40, "batch": 64, "lr": 0.01},
        "abd": {"iterations": 40, "batch": 64, "lr": 0.01},
        "otbr": {"steps": 100},
        "inversion": {"batches": 2, "steps": 100, "epochs": 30, "lr": 0.01},
    },
    shares={"4 %": 2000, "1 %": 500},
    others={"cifar100": ("resnet8", {})},
    archs=("resnet20", "wrn16-1"),
    targets=(0, 2, 5),
    seeds=(0, 1, 2),
    subsets=(0, 1),
    rates=(0.002, 0.0065, 0.011, 0.0155, 0.02),
    alphas=(0.0, 0.1, 0.3, 1.0, 2.0),
    factors=(0.2, 0.5, 1.0, 2.0, 5.0),
    patches=(1, 2, 3, 5, 7),
    triggers=6,
    tested=2000,
    minutes={"plant": 20.0, "tune": 8.0, "dhbe": 3.0, "defend": 1.5},
)  # fmt: skip

PAPER = Scale(
    name="paper",
    summary="as the paper has it, hours a case on a GPU: ResNet-18, its four data sets, 15,000 iterations",
    data="cifar10",
    arch="resnet18",
    fit={"epochs": 200, "schedule": "steps"},
    attacks={},
    sizes=(3, 5, 7),
    dhbe=("paper", {}),
    budgets={},
    shares={"4 %": 2000, "1 %": 500},
    others={"cifar100": ("resnet18", {}), "mini-imagenet": ("resnet18-64", {}), "vggface2-100": ("resnet18-64", {})},
    archs=("resnet34", "wrn40-1", "wrn40-2"),
    targets=tuple(range(9)),
    subsets=(0, 1, 2, 3, 4),
    rates=tuple(round(0.002 * number, 3) for number in range(1, 11)),
    alphas=(0.0, 0.01, 0.02, 0.05, 0.1, 0.2),
    factors=(0.1, 0.2, 0.5, 1.0, 2.0),
    patches=(1, 2, 3, 5, 7),
    triggers=20,
    minutes={"plant": 60.0, "dhbe": 360.0, "defend": 3.0, "mcr": 60.0, "neural-cleanse": 20.0, "gdm": 20.0},
)  # fmt: skip

SCALES = {scale.name: scale for scale in (SMOKE, SMALL, PAPER)}
