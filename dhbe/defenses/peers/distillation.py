"""Data-free adversarial distillation: a generator searches for images on which student and teacher differ."""

from abc import ABC
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam

from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.defenses.base import Defense
from dhbe.generators import NOISE, ImageGenerator, check_generated
from dhbe.run_state import RunState
from dhbe.settings import Setting
from dhbe.steps import Round, channels_last, descend, frozen, frozen_copy, gap, set_lr, stepped


@dataclass(frozen=True)
class Imitation(Defense, ABC):
    """A student that starts as a copy of the model and imitates it on generated images; settings as in DHBE."""

    needs: ClassVar[frozenset] = frozenset()

    iterations: Annotated[
        int, Setting("rounds; each is k student steps and one step of the image generator", least=1)
    ] = 15_000
    student_steps: Annotated[int, Setting("student steps per round (k)", least=1)] = 5
    batch: Annotated[int, Setting("generated images per step", least=4)] = 128
    lr: Annotated[float, Setting("learning rate of the student (SGD), x0.1 at 60 % and 80 % of the rounds")] = 0.1
    momentum: Annotated[float, Setting("momentum of the student's SGD")] = 0.9
    weight_decay: Annotated[float, Setting("weight decay of the student")] = 5e-4
    lr_generator: Annotated[float, Setting("learning rate of the generator (Adam), with the same decay")] = 1e-3

    @property
    def rounds(self) -> int:
        return self.iterations

    def imitate(
        self, model: Classifier, run_state: RunState, dislike: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Iterator[Round]:
        """Runs the adversarial game.

        Args:
            model: The student, in training mode; changed in place.
            run_state: Where everything that changes is registered.
            dislike: An additional loss of the generator, a scalar, from normalised images [n, c, h, w] and the teacher's
                logits [n, classes].

        Yields:
            The losses of each round.
        """
        student, teacher = model, frozen_copy(model)
        images = ImageGenerator(model.shape[1], model.shape[0])
        channels_last(student, teacher, images)
        learn = SGD(student.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)
        imagine = Adam(images.parameters(), self.lr_generator, fused=True)
        run_state.register(student=student, images=images, learn=learn, imagine=imagine)
        done = run_state.restore()
        for iteration in range(done, self.iterations):
            set_lr([learn, imagine], stepped(iteration / self.iterations))
            for _ in range(self.student_steps):  # minimise over S
                with torch.no_grad():
                    x = images(torch.randn(self.batch, NOISE))
                    answer = teacher.logits(x)
                distillation = gap(student.logits(x), answer)
                descend(learn, distillation)
            with frozen(student):  # maximise over G; the student's BatchNorm statistics are still updated
                x = images(torch.randn(self.batch, NOISE))
                answer = teacher.logits(x)
                losses = {"distillation": distillation, "disagreement": gap(student.logits(x), answer)}
                if dislike:
                    losses["suspicion"] = dislike(x, answer)
                descend(imagine, losses.get("suspicion", 0.0) - losses["disagreement"])
            yield losses

    def check(self, shape: Shape) -> None:
        super().check(shape)
        check_generated(shape)
