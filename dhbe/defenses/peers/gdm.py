"""GDM: models the distribution of effective triggers and samples from it while the model unlearns them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Adam

from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.defenses.base import Known
from dhbe.defenses.peers.few_data import Tuner
from dhbe.generators import check_patch
from dhbe.run_state import RunState
from dhbe.settings import Setting
from dhbe.steps import Round, descend, frozen, lay

BETAS = (0.5, 0.8, 0.9)
"""Steps of the staircase: probabilities of the target class up to which a trigger is rewarded."""

NOISE = 64
"""Length of the noise z ~ U[0, 1]."""


@dataclass(frozen=True)
class GDM(Tuner):
    """Generative distribution modelling (Qiao, Yang and Li, NeurIPS 2019): max-entropy staircase approximation.

    For each step beta a generator maximises min(p(target), beta) and the entropy of its triggers, which is their mutual
    information with the noise (MINE, Belghazi et al. 2018). The target class is known, as in the DHBE paper (app. D 2).
    Triggers are placed at random in each image, as a defender does not know the trigger's position.
    """

    name: ClassVar[str] = "gdm"
    needs: ClassVar[frozenset] = frozenset({"clean images", "target class"})

    search_epochs: Annotated[int, Setting("epochs of training the generators", least=1)] = 30
    patch: Annotated[int, Setting("side of the triggers in pixels", least=1)] = 3
    hidden: Annotated[int, Setting("width of the generators and of the statistics networks")] = 512
    lr_trigger: Annotated[float, Setting("learning rate of the generators and of the statistics networks (Adam)")] = (
        2e-4
    )
    entropy: Annotated[float, Setting("weight of the triggers' entropy")] = 0.1
    stamped: Annotated[float, Setting("share of the images that carry a sampled trigger during the repair")] = 0.1

    @property
    def rounds(self) -> int:
        return self.search_epochs + self.epochs

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        clean, target = self.lent(model, known), known.target
        assert target is not None  # checked in `Defense.__call__`
        stairs = [Stair(self.patch, model.shape[0], self.hidden) for _ in BETAS]
        staircase = nn.ModuleList(stairs)
        seek = Adam(staircase.parameters(), self.lr_trigger, betas=(0.5, 0.999))
        learn = self.optimizer(model.parameters())
        run_state.register(model=model, stairs=staircase, seek=seek, learn=learn)
        done = run_state.restore()

        model.eval()
        for _ in range(done, self.search_epochs):
            with frozen(model):
                for pixels, _ in self.batches(clean):
                    parts = [
                        self.climb(model, stair, beta, pixels, target)
                        for stair, beta in zip(stairs, BETAS, strict=True)
                    ]
                    success, information = torch.stack(parts).mean(0)
                    descend(seek, -success - self.entropy * information)
            yield {"success": success, "entropy": information}
        model.train()

        def stamp(pixels: Tensor) -> Tensor:
            triggers = torch.stack([stair(torch.rand(len(pixels), NOISE)) for stair in stairs])
            chosen = triggers[torch.randint(len(stairs), (len(pixels),)), torch.arange(len(pixels))].detach()
            return torch.where(torch.rand(len(pixels), 1, 1, 1) < self.stamped, overlay(pixels, chosen), pixels)

        for epoch in range(max(0, done - self.search_epochs), self.epochs):
            yield {"loss": self.tune(model, learn, clean, epoch, stamp=stamp)}

    def climb(self, model: Classifier, stair: "Stair", beta: float, pixels: Tensor, target: int) -> Tensor:
        """The mean probability of the target under a step's triggers, capped at beta, and their entropy in nats [2]."""
        noise = torch.rand(len(pixels), NOISE)
        triggers = stair(noise)
        odds = model(overlay(pixels, triggers)).softmax(1)[:, target]
        information = mutual_information(stair.statistics, triggers.flatten(1), noise, torch.rand_like(noise))
        return torch.stack([odds.clamp(max=beta).mean(), information])

    def check(self, shape: Shape) -> None:
        super().check(shape)
        check_patch(self.patch, shape)


class Stair(nn.Module):
    """A trigger generator, and the statistics network that estimates its mutual information with the noise."""

    def __init__(self, side: int, channels: int, hidden: int) -> None:
        super().__init__()
        values = channels * side**2
        self.make = nn.Sequential(
            nn.Linear(NOISE, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, values), nn.Sigmoid(),
            nn.Unflatten(1, (channels, side, side)),
        )  # fmt: skip
        self.statistics = Statistics(values, NOISE, hidden)

    def forward(self, noise: Tensor) -> Tensor:
        """Triggers [n, c, p, p] in (0, 1) of noise [n, 64]."""
        return self.make(noise)


class Statistics(nn.Module):
    """The statistics network T(x, z) of MINE: [n, d] and [n, e] to [n]."""

    def __init__(self, x: int, z: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(x + z, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.layers(torch.cat([x, z], dim=1)).squeeze(1)


def mutual_information(statistics: nn.Module, x: Tensor, z: Tensor, apart: Tensor) -> Tensor:
    """Donsker and Varadhan's lower bound of the mutual information of x and z, in nats (MINE, eq. 5).

    Args:
        statistics: T; maps x and z to one number per row.
        x: [n, d].
        z: Drawn together with x, [n, e].
        apart: Drawn from the same distribution as z, independently of x, [n, e].
    """
    count = torch.tensor(float(len(x)))
    return statistics(x, z).mean() - (statistics(x, apart).logsumexp(0) - count.log())


def overlay(pixels: Tensor, patches: Tensor) -> Tensor:
    """Images [n, c, h, w] with opaque patches [n, c, p, p], each at its own random position."""
    laid = lay(torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1), *pixels.shape[2:], each=True)
    return pixels * (1 - laid[:, -1:]) + laid[:, :-1]
