"""The preset `fast`: the paper's idea in a hundredth of its iterations, and for networks other than ResNets.

It differs from the paper as follows (docs/method.md has the details):

- Images are crops of two photographs, or of pictures that the user has, and generated images that match the statistics of the teacher's BatchNorm layers.
  No generator maximises disagreement: such a generator finds the trigger by itself and teaches it back.
- Triggers are inverted in the teacher before the student is trained, one for each class in each family. A class whose
  margin grows far beyond those of the others is restricted with full weight; if none stands out, the restriction is
  light, and a clean model hardly changes.
- All triggers found stay in a bank and are shown again as long as the student reacts to them.
- The student keeps the teacher's BatchNorm statistics and takes small, clipped steps, so that it never has to relearn.
- Data-free measures decide which state is kept, when to stop, and when to go back.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD

from dhbe import ranks
from dhbe.classifier import Classifier
from dhbe.data import Shape
from dhbe.defenses.base import Eraser, Known, Samples, Verdict
from dhbe.errors import Failed, Refused
from dhbe.run_state import Plain, RunState
from dhbe.search.families import FAMILIES
from dhbe.search.search import margin
from dhbe.search.statistics import ACCUSED, CONVICTED
from dhbe.search.survey import Findings, Survey, SurveyState, excerpts_of, seek
from dhbe.search.trigger_bank import TriggerBank
from dhbe.settings import Setting
from dhbe.steps import Round, Tell, channels_last, frozen_copy, gap, set_lr, untold


@dataclass(frozen=True)
class FastDHBE(Eraser):
    """Restricted distillation on BatchNorm-matched images and photographs, against triggers inverted beforehand."""

    name: ClassVar[str] = "fast"
    uses: ClassVar[frozenset] = frozenset({"pictures"})

    iterations: Annotated[
        int, Setting("rounds per cycle; each is k student steps, then one step of some trigger families", least=1)
    ] = 40
    cycles: Annotated[
        int,
        Setting("maximum number of cycles; the run ends earlier once a fresh search finds no suspected class", least=1),
    ] = 3
    stop_anomaly: Annotated[
        float,
        Setting("anomaly of a suspected class in the student below which the run ends, in robust standard deviations"),
    ] = 1.0
    student_steps: Annotated[int, Setting("student steps per round (k)", least=1)] = 5
    batch: Annotated[int, Setting("images per student step", least=4)] = 128
    groups: Annotated[
        int, Setting("triggers per batch; each is applied to an equal share of the triggered images", least=1)
    ] = 8
    alpha: Annotated[float, Setting("weight of the restriction (eq. 8)")] = 1.0
    lr: Annotated[
        float,
        Setting("peak learning rate of the student (SGD): warm-up over a tenth of a cycle, then linear decay to 0"),
    ] = 6e-3
    momentum: Annotated[float, Setting("momentum of the student's SGD")] = 0.9
    weight_decay: Annotated[float, Setting("weight decay of the student")] = 5e-4
    clip: Annotated[float, Setting("norm to which the student's gradient is clipped")] = 1.25
    rise: Annotated[
        float,
        Setting(
            "weight, added to the restriction, of the margin that triggers gain for their classes when a class stands out"
        ),
    ] = 0.6
    fall: Annotated[
        float, Setting("weight, added to the distillation, of the margin that images of these classes lose")
    ] = 0.2
    harmless: Annotated[
        float,
        Setting("negative margin below which a gain does not count, in standard deviations of the teacher's logits"),
    ] = 1.0
    trigger_share: Annotated[
        float, Setting("share of triggered images in a student batch when a class stands out", above=0, below=1)
    ] = 0.25
    trigger_share_unsuspected: Annotated[
        float, Setting("share of triggered images in a student batch when none does", above=0, below=1)
    ] = 0.125
    families_at_once: Annotated[
        int, Setting("trigger families that take a search step in the student per round, in rotation")
    ] = 2
    seek_images: Annotated[int, Setting("images per step of such a search", least=1)] = 32
    look_every: Annotated[int, Setting("rounds between two checks of what the student still reacts to", least=1)] = 5
    gain_images: Annotated[int, Setting("images on which the triggers found are tested again", least=2)] = 16
    agreement_images: Annotated[int, Setting("images on which student and teacher are compared", least=1)] = 256
    damaged_agreement: Annotated[
        float, Setting("agreement with the teacher below which the result counts as damaged", most=1)
    ] = 0.7
    lost_agreement: Annotated[
        float, Setting("agreement with the teacher below which the student returns to its best state", most=1)
    ] = 0.3
    survey: Survey = field(default_factory=Survey)

    @property
    def rounds(self) -> int:
        return self.survey.rounds + self.cycles * self.iterations

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[Round]:
        student, teacher = model.eval(), frozen_copy(model)
        state = SurveyState(self.survey, model)
        channels_last(student, teacher)
        learn = SGD(student.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)
        best, progress = Best(student), Progress()
        run_state.register(student=student, learn=learn, best=best, progress=progress, **state.parts())
        run_state.restore()

        if not progress.surveyed:
            yield from self.survey.run(teacher, state, known.pictures)
            self.survey.conclude(teacher, state, run_state.tell)
            state.findings.outliers = ranks.agreed(state.findings.outliers)
            self.look(student, teacher, state, progress)
            progress.surveyed = True
        state.close(run_state)

        while not self.done(state.findings, progress, late=run_state.late()):
            set_lr([learn], best.lr_scale * self.rate(progress.rounds % self.iterations))
            losses = self.step_student(student, learn, state)
            if diverged(student):
                best.restore(student, learn, slower=True)
                losses = {}
                self.look(student, teacher, state, progress)
            else:
                losses |= self.step_triggers(student, state, progress.rounds)
                if (progress.rounds + 1) % self.look_every == 0 or (progress.rounds + 1) % self.iterations == 0:
                    pixels = self.look(student, teacher, state, progress)
                    if progress.agreement < self.lost_agreement:
                        best.restore(student, learn, slower=True)
                    else:
                        best.judge(student, progress.agreement, state.bank, pixels)
            progress.rounds += 1
            if progress.rounds % self.iterations == 0 and state.findings.backdoored:
                self.search_afresh(student, teacher, learn, state, best, run_state.tell)
            yield {**losses, "gain": state.bank.gain.amax(), "agreement": progress.agreement}
        if not best.judged:
            raise Failed("the run diverged and left no usable state: lower --lr, or try another --seed")
        student.load_state_dict(best.weights)

    def step_student(self, student: Classifier, learn: SGD, state: SurveyState) -> Round:
        """Minimises over S, k times. Clean and triggered images share one pass, as BatchNorm statistics are fixed.

        The gap is a mean over all logits and hardly reflects the few images that a trigger still leads to its class, yet
        these are what ASR counts. So where a class stands out, the rise of its margin under triggers is penalised too,
        and so is the fall of the margin on its own images, which must still be recognised.
        """
        backdoored = state.findings.backdoored
        share = self.trigger_share if backdoored else self.trigger_share_unsuspected
        harmless = -self.harmless * state.pool.answers.std()
        least = ranks.size()  # each process gets a part of both kinds
        covered = min(max(1, round(share * self.batch / least)) * least, self.batch - least)
        losses: Round = {}
        for _ in range(self.student_steps):
            pixels, answer = state.pool.sample(self.batch, evenly=True)
            triggers, wanted = state.bank.draw(self.groups)
            group = torch.arange(self.batch) % self.groups
            triggered, clean = ranks.part(triggers[group[:covered]](pixels[:covered])), ranks.part(pixels[covered:])
            logits, mine = student(torch.cat([triggered, clean])), len(triggered)
            told = torch.cat([ranks.part(answer[:covered]), ranks.part(answer[covered:])])
            restriction, distillation = gap(logits[:mine], told[:mine]), gap(logits[mine:], told[mine:])
            if backdoored:
                aims = torch.cat([ranks.part(wanted[group[:covered]]), ranks.part(wanted[group[covered:]])])
                ahead, before = margin(logits, aims), margin(told, aims)
                rise = (ahead - before.clamp_min(harmless))[:mine].clamp_min(0)
                fall = ((before - ahead).clamp_min(0) * (before > 0))[mine:]
                restriction = restriction + self.rise * rise.mean()
                distillation = distillation + self.fall * student.classes * fall.mean()  # each class has an even share
            learn.zero_grad()
            (2 * (1 - share) * distillation + 2 * share * self.alpha * restriction).backward()
            ranks.average(student.parameters())
            nn.utils.clip_grad_norm_(student.parameters(), self.clip)
            learn.step()
            losses = {"distillation": distillation, "restriction": restriction}
        return losses

    def step_triggers(self, student: Classifier, state: SurveyState, round_: int) -> Round:
        """Maximises over R: some families search for triggers that the student still responds to."""
        losses: Round = {}
        for turn in range(self.families_at_once):
            number = (self.families_at_once * round_ + turn) % len(FAMILIES)
            pixels, _ = state.pool.sample(self.seek_images)
            losses[f"margin_{FAMILIES[number].name}"] = seek(
                state.search, student, number, pixels, state.findings.suspected
            )
        return losses

    @torch.no_grad()
    def look(self, student: Classifier, teacher: Classifier, state: SurveyState, progress: "Progress") -> Tensor:
        """Adds newly found triggers to the bank, and updates their gains and the agreement with the teacher.

        Returns:
            The images on which triggers were tested [n, c, h, w], in [0, 1].
        """
        bank, findings = state.bank, state.findings
        pixels, _ = state.pool.sample(self.gain_images)
        for number, (family, sought) in enumerate(zip(state.search.families, findings.sought, strict=True)):
            wanted = sought.nonzero().flatten()
            reached = state.search.margin(student, family, wanted, pixels)
            wanted, reached = (each[reached > findings.natural[number]] for each in (wanted, reached))
            untouched = state.search.margin(teacher, family, wanted, pixels)
            self.survey.keep(state, family.triggers(wanted), wanted, reached, untouched, number)
        bank.retry(student, pixels)
        bank.gain = ranks.agreed(bank.gain)
        compared, answers = state.pool.same(self.agreement_images)
        progress.agreement = ranks.agreed((student(compared).argmax(1) == answers.argmax(1)).float().mean())
        return pixels

    def search_afresh(
        self,
        student: Classifier,
        teacher: Classifier,
        learn: SGD,
        state: SurveyState,
        best: "Best",
        tell: Tell = untold,
    ) -> None:
        """Returns to the best state and searches it for triggers that the first search missed; each step is told.

        Records how far a suspected class still stands out, by the margin of squares of the survey's size.
        """
        best.restore(student, learn)
        left, side = [], excerpts_of(state.search).side
        for label in state.findings.suspected.nonzero().flatten().tolist():
            triggers, margins = self.survey.hunt(student, state, label, tell)
            untouched = self.survey.excerpting.reached(teacher, triggers, label, state.pool)
            self.survey.keep(state, triggers, torch.full((len(margins),), label), margins, untouched)
            squares = (triggers.keep == 0).sum((1, 2, 3)) == side**2
            left.append(state.findings.standing(margins[squares].amax()))
        state.findings.left = ranks.agreed(torch.stack(left).amax())
        state.bank.retry(student, state.pool.sample(self.gain_images)[0])

    def done(self, findings: Findings, progress: "Progress", *, late: bool = False) -> bool:
        """Whether a cycle is over and no further one is needed or allowed, or it is too `late` for one.

        There are at least two cycles, since what the first fresh search finds has yet to be unlearned.
        """
        cycle, more = divmod(progress.rounds, self.iterations)
        if progress.rounds == 0 or more:
            return False
        ordinary = cycle > 1 and bool(findings.left <= self.stop_anomaly)
        over = cycle == self.cycles or not findings.backdoored or ordinary
        progress.cut_short = late and not over
        return over or late

    def found(self, run_state: RunState) -> dict[str, float]:
        """Anomaly index and suspected class, the strongest trigger's gain and the anomaly left in the end, the evidence."""
        findings: Findings = run_state.part("findings")
        anomaly = findings.anomaly.amax(0)
        return {
            "anomaly_index": float(anomaly.max()),
            "suspected_class": int(anomaly.argmax()),
            "gain": float(run_state.part("best").gain),
            "left": float(findings.left),
            "evidence": float(findings.fused.max()),
        }

    def verdict(self, run_state: RunState) -> Verdict:
        """The verdict of a finished run, without data.

        - `damaged`: the cleaned model disagrees with the suspect model.
        - `still answers`: a suspected class still stands out in a fresh search of the cleaned model, or statistics
          accuse a class for which no trigger was found, so that nothing could be unlearned.
        - `erased`: a class stood out, and none does any more.
        - `nothing found`: no class stood out.
        """
        findings: Findings = run_state.part("findings")
        if float(run_state.part("best").agreement) < self.damaged_agreement:
            return "damaged"
        if findings.unexplained.any() or findings.left > self.survey.anomaly_threshold:
            return "still answers"
        return "erased" if findings.backdoored else "nothing found"

    def remarks(self, run_state: RunState) -> list[str]:
        findings: Findings = run_state.part("findings")
        said = [
            f"statistics accuse class {label}, but no trigger for it was found: nothing was unlearned for it"
            for label in findings.unexplained.nonzero().flatten().tolist()
        ]
        weak = (findings.fused >= ACCUSED) & (findings.fused < CONVICTED) & ~findings.suspected
        said += [
            f"statistics weakly accuse class {label} (evidence {float(findings.fused[label]):.2f}; {CONVICTED} is strong), but no "
            "trigger for it was found: nothing was unlearned for it"
            for label in weak.nonzero().flatten().tolist()
        ]
        progress: Progress = run_state.part("progress")
        if progress.cut_short:
            said.append(
                f"--budget ended the run after {progress.rounds // self.iterations} of up to {self.cycles} cycles: with more time, "
                "less of the backdoor might be left"
            )
        if not findings.backdoored:
            said.append("no class stood out: the restriction was light, and a backdoor that the search missed remains")
        return said

    def check(self, shape: Shape) -> None:
        super().check(shape)
        self.survey.check(shape)
        ranks.check(self.batch)
        if self.survey.pool_size < self.batch:
            raise Refused(f"--pool-size {self.survey.pool_size}: it must be at least one batch, {self.batch} images")

    def rate(self, iteration: int) -> float:
        """The factor on the student's learning rate at an iteration of a cycle, counted from 0."""
        done = iteration / self.iterations
        return max(0.0, min((iteration + 1) / max(1, round(0.1 * self.iterations)), (1 - done) / 0.9, 1.0))

    def draw_samples(self, model: Classifier, run_state: RunState, count: int) -> Samples:
        pixels, _ = run_state.part("pool").sample(count)
        bank: TriggerBank = run_state.part("bank")
        strongest = bank.strength.argsort(descending=True)[: max(1, len(bank))]
        triggers = bank.triggers(strongest[torch.randint(len(strongest), (count,))])
        return Samples(pixels, triggers(pixels), triggers(torch.full_like(pixels, 0.5)))


def diverged(model: Classifier) -> bool:
    """Whether the sum of squares of all weights is not finite, which happens long before logits are not."""
    return not torch.stack([each.detach().square().sum() for each in model.parameters()]).sum().isfinite()


class Progress(Plain):
    """Progress of a run."""

    def __init__(self) -> None:
        self.surveyed = False
        """Whether the survey is concluded."""
        self.rounds = 0
        """Rounds done, over all cycles."""
        self.cut_short = False
        """Whether the run ended because its time was over."""
        self.agreement = torch.ones(())
        """The share of images to which student and teacher assigned the same class at the last comparison, a scalar."""


class Best(Plain):
    """The best state of the student so far: the one with the largest agreement minus the strongest trigger's gain.

    It starts as the teacher, which agrees with itself and on which a trigger acts: a student that lost more than it
    unlearned is no better.
    """

    def __init__(self, student: Classifier) -> None:
        self.weights = _copied(student)
        self.agreement, self.gain, self.lr_scale = 1.0, 1.0, 1.0
        self.judged = self.replaced = False
        """Whether a state was compared with it, and whether one was better."""

    def judge(self, student: Classifier, agreement: Tensor, bank: TriggerBank, pixels: Tensor) -> None:
        """Keeps the current state if it is at least as good as the best so far.

        The best state is tested again, on the same images [n, c, h, w] and with all triggers of the bank: a state that
        was never tested with triggers found later would look better than it is.
        """
        self.judged, now = True, _copied(student)
        if self.replaced:
            student.load_state_dict(self.weights)
            self.gain = float(ranks.agreed(bank.tried(student, pixels).amax()))
            student.load_state_dict(now)
        gain = float(bank.gain.amax())
        if float(agreement) - gain >= self.agreement - self.gain:
            self.agreement, self.gain, self.weights, self.replaced = float(agreement), gain, now, True

    def restore(self, student: Classifier, learn: SGD, *, slower: bool = False) -> None:
        """Returns to the best state and clears the momentum; `slower` halves the learning rate."""
        student.load_state_dict(self.weights)
        learn.state.clear()
        self.lr_scale /= 1 + slower


def _copied(student: Classifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in student.state_dict().items()}
