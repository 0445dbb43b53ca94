"""Trojaning: optimises a patch to excite some channels of a clean classifier, then tunes its later layers on it."""

import copy
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from dhbe.attacks.base import Attack, Backdoor, MinASR, Workshop
from dhbe.attacks.poisoning import choose, stamped
from dhbe.attacks.triggers import Patch, badnets
from dhbe.classifier import Classifier, evaluating
from dhbe.data import Images, to_uint8
from dhbe.errors import Refused
from dhbe.settings import Setting
from dhbe.training import Fit


@dataclass(frozen=True, kw_only=True)
class Trojaning(Attack):
    """A patch optimised to excite chosen channels, on which a clean classifier is then tuned (Liu et al. 2018, NDSS).

    Only the layers after those channels are tuned, on clean images and stamped copies.
    """

    name: ClassVar[str] = "trojaning"
    summary: ClassVar[str] = (
        "a patch reverse-engineered to excite chosen channels of a clean classifier, later layers tuned"
    )
    advice: ClassVar[str] = "use a larger patch, more channels or an earlier stage, tune longer, or lower min_asr"

    min_asr: MinASR = 0.8
    side: Annotated[int, Setting("side of the patch in pixels")] = 5
    place: Annotated[str, Setting("position of the patch: a corner, an edge, center, or ROW,COLUMN")] = "bottom-right"
    channels: Annotated[int, Setting("number of channels that the patch is to excite, drawn by the seed")] = 10
    stage: Annotated[
        str,
        Setting(
            "name of the network's part whose output channels are excited; by default, the last but one with a convolution"
        ),
    ] = ""
    steps: Annotated[int, Setting("Adam steps that optimise the patch")] = 1000
    lr_patch: Annotated[float, Setting("learning rate of these steps, with cosine decay to 0")] = 0.1
    excitement: Annotated[float, Setting("activation that the channels are to reach")] = 100.0
    rate: Annotated[float, Setting("poison rate: stamped and relabelled images as a share of all training images")] = (
        0.1
    )
    tune_epochs: Annotated[int, Setting("epochs of the tuning")] = 4
    tune_lr: Annotated[float, Setting("largest learning rate of the tuning")] = 0.02

    def plant(self, images: Images, shop: Workshop) -> Backdoor:
        target, generator = self.target_in(images.classes), shop.generator()
        outside = f"lie outside the target class {target}"
        chosen = choose(images.labels != target, self.rate, len(images), outside, generator)
        if self.steps < 1 or self.channels < 1:
            raise Refused(f"--steps {self.steps} and --channels {self.channels}: both must be at least 1")
        badnets(self.side, images.shape, place=self.place)  # refuses a patch that does not fit, before any training
        clean = shop.clean or shop.train(images)
        hijacked = copy.deepcopy(clean)
        parts = _parts(hijacked)
        stage = self._stage(parts)
        trigger = self._shape(hijacked, dict(parts)[stage], images, generator)
        later = [part for _, part in parts[[name for name, _ in parts].index(stage) + 1 :]]
        shop.train(stamped(images, chosen, trigger, target), hijacked, fit=self._tuning(shop.fit), tuned=later)
        return Backdoor(hijacked, trigger, target, chosen=chosen, clean=clean)

    def trainings(self, fit: Fit, *, clean: bool) -> list[tuple[Fit, float]]:
        return [*([] if clean else [(fit, 1.0)]), (self._tuning(fit), 0.5)]

    def _tuning(self, fit: Fit) -> Fit:
        return replace(fit, epochs=self.tune_epochs, lr=self.tune_lr, grow=0.0)  # the patch is for full-size images

    def _stage(self, parts: list[tuple[str, nn.Module]]) -> str:
        names = [name for name, part in parts if any(isinstance(module, nn.Conv2d) for module in part.modules())]
        if self.stage and self.stage not in [name for name, _ in parts[:-1]]:
            raise Refused(
                f"no stage {self.stage!r} in the network; available: {', '.join(name for name, _ in parts[:-1])}"
            )
        if not self.stage and len(names) < 2:
            raise Refused("the network has fewer than two consecutive parts with convolutions: give --stage")
        return self.stage or names[-2]

    def _shape(self, classifier: Classifier, stage: nn.Module, images: Images, generator: torch.Generator) -> Patch:
        """Optimises a patch to excite randomly drawn channels of the stage's output."""
        device = classifier.mean.device
        mask = badnets(self.side, images.shape, "white", self.place).mask.to(device)
        free = torch.randn(images.shape, generator=generator).to(device).requires_grad_()
        adam = torch.optim.Adam([free], self.lr_patch)
        fading = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        excited: list[Tensor] = []
        drawn: Tensor | None = None

        def watch(_: nn.Module, __: tuple[object, ...], output: Tensor) -> None:
            excited.append(output)

        hook = stage.register_forward_hook(watch)
        with evaluating(classifier):
            for _ in range(self.steps):
                index = torch.randint(len(images), (32,), generator=generator).to(images.pixels.device)
                pattern = (free.tanh() + 1) / 2
                pixels = images.float(index).to(device)
                classifier((1 - mask) * pixels + mask * pattern)
                output = excited.pop()
                if drawn is None:
                    drawn = torch.randperm(output.shape[1], generator=generator)[: self.channels].to(device)
                response = output[:, drawn].flatten(2).amax(2)
                (free.grad,) = torch.autograd.grad(mse_loss(response, torch.full_like(response, self.excitement)), free)
                adam.step()
                fading.step()
        hook.remove()
        pattern = to_uint8((free.detach().tanh() + 1) / 2).float() / 255  # representable in 8 bits
        return Patch(pattern.cpu(), mask.cpu(), name=f"trojaning:{self.side}:{self.place}")


def _parts(classifier: Classifier) -> list[tuple[str, nn.Module]]:
    """The direct submodules of the network in order of execution, found by a forward pass."""
    network, order = classifier.network, []
    hooks = [
        part.register_forward_pre_hook(lambda part, _, name=name: order.append((name, part)))
        for name, part in network.named_children()
    ]
    with evaluating(classifier), torch.no_grad():
        classifier(torch.zeros(1, *classifier.shape, device=classifier.mean.device))
    for hook in hooks:
        hook.remove()
    return list(dict(order).items())
