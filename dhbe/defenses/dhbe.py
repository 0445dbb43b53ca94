"""DHBE: data-free holistic backdoor erasing (Yan et al., AsiaCCS 2023).

A student starts as a copy of the suspect model, the teacher. One generator draws images on which the two disagree, and the
student learns to agree (distillation); another draws small patches to which the student reacts, and the student learns to
ignore them (restriction). No natural image is used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adam

from dhbe import ranks
from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.defenses.base import Eraser, Known, Samples
from dhbe.defenses.cuda_graph import CudaGraph
from dhbe.errors import Refused
from dhbe.generators import NOISE, ImageGenerator, TriggerGenerator, check_patch
from dhbe.run_state import RunState
from dhbe.settings import Setting
from dhbe.steps import Round, channels_last, descend, frozen, frozen_copy, gap, lay, set_lr, stepped, variation

Engine = Literal["eager", "graph", "compile"]
"""How an iteration is executed; the result is the same for all of them."""


@dataclass(frozen=True)
class DHBE(Eraser):
    """Restricted adversarial distillation (section 4, algorithm 1); the defaults are the paper's."""

    name: ClassVar[str] = "dhbe"

    iterations: Annotated[
        int,
        Setting(
            "rounds; each is k student steps, one step of the image generator and one of the trigger generator", least=1
        ),
    ] = 15_000
    patch: Annotated[int, Setting("side of the generated triggers in pixels (p)", least=1)] = 5
    student_steps: Annotated[int, Setting("student steps per round (k)", least=1)] = 3
    batch: Annotated[int, Setting("generated images per step", least=4)] = 128
    alpha: Annotated[float, Setting("weight of the restriction (eq. 8)")] = 0.1
    lr: Annotated[float, Setting("learning rate of the student (SGD), x0.1 at 60 % and 80 % of the rounds")] = 0.1
    momentum: Annotated[float, Setting("momentum of the student's SGD")] = 0.9
    weight_decay: Annotated[float, Setting("weight decay of the student")] = 5e-4
    lr_generators: Annotated[float, Setting("learning rate of both generators (Adam), with the same decay")] = 1e-3
    scale: Annotated[float, Setting("largest change of a pixel by a generated trigger (s)")] = 1.0
    places: Annotated[
        Literal["batch", "sample"], Setting("one random position for the whole batch, or one for each image")
    ] = "batch"
    smooth: Annotated[float, Setting("weight of the smoothness prior on generated images")] = 0.0
    detach_clean: Annotated[bool, Setting("stop the gradient through the clean branch of the restriction")] = False
    engine: Annotated[
        Engine, Setting("graph: run each iteration as one CUDA graph; compile: compile the networks as well")
    ] = "eager"

    @property
    def rounds(self) -> int:
        return self.iterations

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        student, teacher = model, frozen_copy(model)
        channels, side, _ = model.shape
        images, triggers = ImageGenerator(side, channels), TriggerGenerator(self.patch, channels)
        channels_last(student, teacher, images)
        learn = SGD(student.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)
        imagine = Adam(images.parameters(), self.lr_generators, fused=True, capturable=self.captures(model))
        attack = Adam(triggers.parameters(), self.lr_generators, fused=True, capturable=self.captures(model))
        optimizers = {"learn": learn, "imagine": imagine, "attack": attack}
        run_state.register(student=student, images=images, triggers=triggers, **optimizers)
        done = run_state.restore()
        if self.engine == "compile":
            student.network.compile()
            teacher.network.compile()

        def draw() -> Tensor:
            return images(ranks.part(torch.randn(self.batch, NOISE)))

        def stamp(normalised: Tensor) -> Tensor:
            return self.stamp(model, normalised, triggers(ranks.part(torch.randn(self.batch, NOISE))))

        def iterate() -> Round:
            for _ in range(self.student_steps):  # minimise over S
                with torch.no_grad():
                    x = draw()
                    triggered, answer = stamp(x), teacher.logits(x)
                clean = student.logits(x)  # separate passes: each batch has its own BatchNorm statistics
                distillation = gap(clean, answer)
                restriction = gap(student.logits(triggered), clean.detach() if self.detach_clean else clean)
                descend(learn, distillation + self.alpha * restriction)

            with frozen(student):  # its BatchNorm statistics are still updated
                x = draw()  # maximise over G
                disagreement = gap(student.logits(x), teacher.logits(x))
                descend(imagine, self.smooth * variation(x) - disagreement if self.smooth else -disagreement)

                with torch.no_grad():  # maximise over R
                    x = draw()
                    clean = student.logits(x)
                reaction = gap(student.logits(stamp(x)), clean)
                descend(attack, -reaction)

            losses = {"distillation": distillation, "restriction": restriction}
            return losses | {"disagreement": disagreement, "reaction": reaction}

        whole = CudaGraph(iterate) if self.captures(model) else None
        with ranks.whole_batches(student, images, triggers):
            for iteration in range(done, self.iterations):
                rate = stepped(iteration / self.iterations)
                set_lr(optimizers.values(), rate)
                yield whole(rate) if whole else iterate()

    def check(self, shape: Shape) -> None:
        super().check(shape)
        check_patch(self.patch, shape)
        ranks.check(self.batch)
        if self.engine != "eager" and ranks.size() > 1:
            raise Refused(f"--engine={self.engine} needs a single process: use --engine=eager, or run without torchrun")

    def captures(self, model: Classifier) -> bool:
        """Whether iterations are captured as CUDA graphs.

        Raises:
            Refused: `engine` is `graph` and the model is not on a CUDA device.
        """
        if self.engine == "graph" and not model.mean.is_cuda:
            raise Refused("--engine=graph needs a CUDA device: use --engine=eager or --engine=compile")
        return self.engine != "eager" and model.mean.is_cuda

    def stamp(self, model: Classifier, normalised: Tensor, triggers: Tensor) -> Tensor:
        """Adds triggers to normalised images, in pixel space and at random positions; the sum is not clipped (app. B.3).

        Args:
            model: Holds the normalisation.
            normalised: Normalised images [n, c, h, w].
            triggers: Patches [n, c, p, p] in (-1, 1).

        Returns:
            Normalised images [n, c, h, w].
        """
        height, width = model.shape[1:]
        patches = lay(self.scale * triggers, height, width, each=self.places == "sample")
        return model.normalise(model.denormalise(normalised) + patches)

    def draw_samples(self, model: Classifier, run_state: RunState, count: int) -> Samples:
        images, triggers = run_state.part("images"), run_state.part("triggers")
        normalised, patches = images(torch.randn(count, NOISE)), triggers(torch.randn(count, NOISE))
        triggered = self.stamp(model, normalised, patches)
        return Samples(model.denormalise(normalised), model.denormalise(triggered), (patches + 1) / 2)


PAPER = DHBE()
"""Hyperparameters of the paper's text."""

OFFICIAL = DHBE(student_steps=5, batch=256, smooth=1e-4, detach_clean=True)
"""Hyperparameters of the authors' released script; docs/method.md lists where it differs from the text."""
