"""The preset `fast`: the paper's idea in a hundredth of its iterations, on networks that are not only ResNets.

What differs from the paper, and why (docs/method.md tells more):

- Images are pieces of two photographs, and images that a generator makes familiar to the teacher's BatchNorm layers.
  None seeks disagreement: a generator that does finds the trigger by itself and teaches it back.
- Triggers are sought in the teacher before the student moves, one for each class, patches and masked and faint patterns.
  What leads a class far more than the others is a backdoor's work and is restricted with full weight; where nothing
  stands out the restriction is light, and a clean model stays what it is.
- All triggers found stay in a memory and are shown again as long as the student reacts to them.
- The student keeps the teacher's BatchNorm statistics and moves by small, bounded steps, so that it never has to relearn.
- Signs that need no data decide which state is kept, when to stop, and when to go back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD

from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.defenses.base import Known, Samples
from dhbe.errors import Failed, Refused
from dhbe.run_state import RunState
from dhbe.search.families import NAMES
from dhbe.search.survey import Survey, SurveyState, seek
from dhbe.search.trigger_bank import TriggerBank
from dhbe.steps import Round, channels_last, frozen_copy, gap, set_lr

GROUPS = 8
"""Triggers in a batch; each is laid on its share of the triggered images."""

REFRESH = 5
"""Rounds between two looks at what the student still reacts to."""

AT_ONCE = 2
"""Families that go on seeking in the student in one round; all have their turns."""

SOUGHT = 32
"""Images in one step of them."""

TRIED = 16
"""Images on which a remembered trigger is tried again."""

COMPARED = 256
"""Images on which student and teacher are compared."""

HELPED = 2 / 3
"""To what share a cycle must bring the success of the strongest trigger, or it is the last one."""

NOTHING = -1.0
"""The agreement of no state at all."""

LOST = 0.3
"""Agreement with the teacher below which the student is lost, and goes back. Half is common in the first rounds against a
strong trigger, and is made up for."""


@dataclass(frozen=True)
class FastDHBE(Survey):
    """Restricted distillation on familiar images, against triggers that were sought before."""

    name: ClassVar[str] = "fast"

    iterations: Annotated[int, "rounds a cycle: k student steps, then one step of two families of triggers"] = 40
    cycles: Annotated[int, "cycles at the most; another one follows while it helps against triggers that still act"] = 3
    stop_threshold: Annotated[
        float, "share of images that the strongest trigger may still lead to its class at the end"
    ] = 0.02
    student_steps: Annotated[int, "student steps per round (k)"] = 5
    alpha: Annotated[float, "weight of the restriction (eq. 8)"] = 1.0
    lr: Annotated[float, "peak learning rate of the student (SGD): up for a tenth of a cycle, then down to 0"] = 5e-3
    momentum: Annotated[float, "momentum of the student's SGD"] = 0.9
    weight_decay: Annotated[float, "weight decay of the student"] = 5e-4
    clip: Annotated[float, "largest norm of the student's gradient"] = 1.0
    triggered: Annotated[float, "share of triggered images in a student batch when a class stands out"] = 0.5
    light: Annotated[float, "the same when none does"] = 0.125

    @property
    def rounds(self) -> int:
        return self.longest + self.cycles * self.iterations

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        student, teacher = model.eval(), frozen_copy(model)
        notes = SurveyState(self, model)
        channels_last(student, teacher)
        learn = SGD(student.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)
        best = Best(student)
        done = run_state.keep(student=student, learn=learn, best=best, **notes.parts())

        if done <= notes.memory.surveyed:  # nothing of the conclusion is in a run_state of the last round before it
            yield from self.survey(teacher, notes, done)
            self.conclude(teacher, notes)
            self.look(student, notes)
        notes.close(run_state)
        memory = notes.memory
        share = self.triggered if memory.backdoored else self.light
        covered = min(max(1, round(share * self.batch)), self.batch - 1)

        for round_ in range(max(0, done - int(memory.surveyed)), self.cycles * self.iterations):
            if round_ and round_ % self.iterations == 0 and (not memory.backdoored or best.enough(self.stop_threshold)):
                break
            set_lr([learn], best.pace * self.rate(round_ % self.iterations))
            for _ in range(self.student_steps):  # minimise over S: both kinds of image in one pass, no statistics move
                pixels, answer = notes.album.sample(self.batch, evenly=True)
                triggered = memory.draw(GROUPS)[torch.arange(covered) % GROUPS](pixels[:covered])
                logits = student(torch.cat([triggered, pixels[covered:]]))
                restriction = gap(logits[:covered], answer[:covered])
                distillation = gap(logits[covered:], answer[covered:])
                learn.zero_grad()
                (2 * (1 - share) * distillation + 2 * share * self.alpha * restriction).backward()
                nn.utils.clip_grad_norm_(student.parameters(), self.clip)
                learn.step()

            torn = not bool(energy(student).isfinite())
            losses = {} if torn else {"distillation": distillation, "restriction": restriction}
            for number in () if torn else turns(round_):  # maximise over R
                pixels, _ = notes.album.sample(SOUGHT)
                losses[f"lead_{NAMES[number]}"] = seek(notes.search, student, number, pixels, memory.suspects)
            if torn or (round_ + 1) % REFRESH == 0 or (round_ + 1) % self.iterations == 0:
                if torn:
                    best.restore(student, learn)
                pixels = self.look(student, notes)
                if not torn:
                    best.judge(student, learn, memory, pixels)
            yield {**losses, "success": memory.success.amax(), "agreement": memory.agreement}
        if best.agreement == NOTHING:
            raise Failed("the run diverged, and no state of it is sound: lower --lr, or another --seed")
        student.load_state_dict(best.state)

    @torch.no_grad()
    def look(self, student: Classifier, notes: SurveyState) -> Tensor:
        """Takes the signs: what was found meanwhile, what still acts, and whether the student answers as the teacher.

        Returns the images on which triggers were tried.
        """
        memory = notes.memory
        pixels, _ = notes.album.sample(TRIED)
        for family, sought, natural in zip(notes.search.families, memory.sought, memory.natural, strict=True):
            wanted = sought.nonzero().flatten()
            lead = notes.search.lead(student, family, wanted, pixels)
            stronger = lead > natural
            memory.take(family.forms(wanted[stronger]), wanted[stronger], lead[stronger])
        memory.retry(student, pixels)
        compared, answers = notes.album.same(COMPARED)
        memory.agreement = (student(compared).argmax(1) == answers.argmax(1)).float().mean()
        return pixels

    def found(self, run_state: RunState) -> dict[str, float]:
        """How far the class that stands out most does, against `anomaly_threshold`; which it is; what acts in the end."""
        memory: TriggerBank = run_state.part("memory")
        anomaly = memory.anomaly.amax(0)
        return {
            "anomaly_index": float(anomaly.max()),
            "suspected_class": int(anomaly.argmax()),
            "success": float(run_state.part("best").success),
        }

    def check(self, shape: Shape) -> None:
        super().check(shape)
        for name in ("triggered", "light"):
            if not 0 < (share := getattr(self, name)) < 1:
                raise Refused(f"--{name} {share}: it must be a share, above 0 and below 1")

    def rate(self, iteration: int) -> float:
        """The share of the student's learning rate in force at this iteration of a cycle."""
        done = iteration / self.iterations
        return max(0.0, min((iteration + 1) / max(1, round(0.1 * self.iterations)), (1 - done) / 0.9, 1.0))

    def draw_samples(self, model: Classifier, run_state: RunState, count: int) -> Samples:
        pixels, _ = run_state.part("album").sample(count)
        memory: TriggerBank = run_state.part("memory")
        strongest = memory.strength.argsort(descending=True)[: max(1, len(memory))]
        forms = memory.forms(strongest[torch.randint(len(strongest), (count,))])
        return Samples(pixels, forms(pixels), forms(torch.full_like(pixels, 0.5)))


def turns(round_: int) -> list[int]:
    """The families that seek in this round, by their numbers."""
    return [(AT_ONCE * round_ + each) % len(NAMES) for each in range(AT_ONCE)]


def energy(model: Classifier) -> Tensor:
    """The sum of the squares of all weights, which is not finite long before an answer is not."""
    return torch.stack([parameter.detach().square().sum() for parameter in model.parameters()]).sum()


class Best:
    """The best state of the student so far, by signs that need no data: agreement less the strongest trigger's success."""

    def __init__(self, student: Classifier) -> None:
        self.state = {name: value.clone() for name, value in student.state_dict().items()}
        self.agreement, self.success, self.pace, self.earlier = NOTHING, 1.0, 1.0, 1.0

    def judge(self, student: Classifier, learn: SGD, memory: TriggerBank, pixels: Tensor) -> None:
        """Keeps this state if it is as good as the best before; a student that is lost goes back there.

        Both are tried on the same images [n, c, h, w] with all that is remembered by now: triggers are found all the
        time, and an early state that was never tried with the later ones would look better than it is.
        """
        if memory.agreement < LOST:
            self.restore(student, learn)
            return
        now = {name: value.clone() for name, value in student.state_dict().items()}
        if self.agreement > NOTHING:
            student.load_state_dict(self.state)
            self.success = float(memory.tried(student, pixels).amax())
            student.load_state_dict(now)
        agreement, success = float(memory.agreement), float(memory.success.amax())
        if agreement - success >= self.agreement - self.success:
            self.agreement, self.success, self.state = agreement, success, now

    def restore(self, student: Classifier, learn: SGD) -> None:
        """Goes back to the best state, without the momentum that led away from it, and slows down."""
        student.load_state_dict(self.state)
        learn.state.clear()
        self.pace /= 2

    def enough(self, stop_threshold: float) -> bool:
        """At the end of a cycle: whether no trigger acts any more, or the cycle helped little."""
        helped, self.earlier = self.success <= HELPED * self.earlier, self.success
        return self.success <= stop_threshold or not helped

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a saved state over; weights go where those of the first state lie, not where they were read to."""
        state = {name: value.to(self.state[name].device) for name, value in state_dict["state"].items()}
        vars(self).update({**state_dict, "state": state})
