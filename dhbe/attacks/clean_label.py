"""Clean-label: makes images of the target class hard to recognise, so that a patch on them is learned instead."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from dhbe.attacks.base import Attack, Backdoor, MinASR, Workshop
from dhbe.attacks.pgd import pgd
from dhbe.attacks.poisoning import choose, stamped
from dhbe.attacks.triggers import badnets
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.settings import Setting
from dhbe.training import Fit


@dataclass(frozen=True, kw_only=True)
class CleanLabel(Attack):
    """A patch on images of the target class made hard to recognise; labels kept (Turner et al. 2019, arXiv:1912.02771).

    The images are perturbed adversarially against a proxy, an adversarially trained classifier of the same architecture.
    With an ordinarily trained or untrained proxy, the object remains recognisable and the attack fails. Small patches are
    weak in the DHBE paper too (46 % ASR).
    """

    name: ClassVar[str] = "clean-label"
    summary: ClassVar[str] = "a patch on adversarially blurred images of the target class, labels kept"
    advice: ClassVar[str] = (
        "poison more images, raise epsilon, train the proxy longer, use a larger patch, or lower min_asr"
    )

    min_asr: MinASR = 0.8
    side: Annotated[int, Setting("side of the patch in pixels")] = 5
    style: Annotated[str, Setting("style of the patch: checkerboard, checkerboard2, white or random")] = "checkerboard"
    place: Annotated[str, Setting("position of the patch: a corner, an edge, center, or ROW,COLUMN")] = "bottom-right"
    rate: Annotated[float, Setting("poison rate: changed images as a share of all training images")] = 0.006
    epsilon: Annotated[float, Setting("largest change of any value, in units of 1/255 (8 to 16 in the literature)")] = (
        16.0
    )
    step: Annotated[float, Setting("change of a value in one step, in units of 1/255")] = 1.5
    steps: Annotated[int, Setting("steps of the adversarial perturbation")] = 100
    proxy_epochs: Annotated[int, Setting("epochs of the proxy's training")] = 10
    proxy_epsilon: Annotated[
        float, Setting("largest change of any value in the proxy's training, in units of 1/255")
    ] = 8.0
    proxy_steps: Annotated[int, Setting("steps of the adversarial perturbation in the proxy's training")] = 2

    def plant(self, images: Images, shop: Workshop) -> Backdoor:
        trigger, target = badnets(self.side, images.shape, self.style, self.place), self.target_in(images.classes)
        generator = shop.generator()
        inside = f"lie in the target class {target}"
        chosen = choose(images.labels == target, self.rate, len(images), inside, generator)
        proxy = self._proxy(images, shop)

        def spoiled(pixels: Tensor) -> Tensor:
            there = pixels.to(proxy.mean.device)
            labels = torch.full((len(pixels),), target, device=there.device)
            hard = pgd(
                proxy, there, labels, epsilon=self.epsilon / 255, step=self.step / 255, steps=self.steps,
                generator=generator,
            )  # fmt: skip
            return trigger(hard.to(pixels.device))

        return Backdoor(shop.train(stamped(images, chosen, spoiled, None)), trigger, target, chosen=chosen)

    def trainings(self, fit: Fit, *, clean: bool) -> list[tuple[Fit, float]]:
        return [(self._proxy_fit(fit), 1 + 0.7 * self.proxy_steps), (fit, 1.0)]  # gradients of images alone are cheaper

    def _proxy_fit(self, fit: Fit) -> Fit:
        # Only the length differs: changing weight decay or smoothing does not help in a short adversarial training.
        return replace(fit, epochs=self.proxy_epochs)

    def _proxy(self, images: Images, shop: Workshop) -> Classifier:
        proxy, size = shop.fresh(), self.proxy_epsilon / 255

        def perturb(pixels: Tensor, labels: Tensor) -> Tensor:
            return pgd(proxy, pixels, labels, epsilon=size, step=1.25 * size / self.proxy_steps, steps=self.proxy_steps)

        return shop.train(images, proxy, fit=self._proxy_fit(shop.fit), perturb=perturb)
