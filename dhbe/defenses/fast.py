"""The preset `fast`: the paper's idea in a hundredth of its iterations, on networks that are not only ResNets.

What differs from the paper, and why (docs/method.md tells more):

- Images are pieces of two photographs, and images that a generator makes familiar to the teacher's BatchNorm layers.
  None seeks disagreement: a generator that does finds the trigger by itself and teaches it back.
- Triggers are sought in the teacher before the student moves, one for each class in each family. A class whose margin
  grows far beyond those of the others is restricted with full weight; where none stands out the restriction is light,
  and a clean model stays what it is.
- All triggers found stay in a bank and are shown again as long as the student reacts to them.
- The student keeps the teacher's BatchNorm statistics and moves by small, bounded steps, so that it never has to relearn.
- Signs that need no data decide which state is kept, when to stop, and when to go back.
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
from dhbe.steps import Round, channels_last, frozen_copy, gap, set_lr

NOTHING = -1.0
"""The agreement of no state at all."""


@dataclass(frozen=True)
class FastDHBE(Eraser):
    """Restricted distillation on familiar images, against triggers that were sought before."""

    name: ClassVar[str] = "fast"

    iterations: Annotated[
        int, Setting("rounds a cycle: k student steps, then one step of some families of triggers", least=1)
    ] = 40
    cycles: Annotated[
        int, Setting("cycles at the most; another one follows until a fresh search finds no suspected class", least=1)
    ] = 3
    stop_anomaly: Annotated[
        float, Setting("robust standard deviations by which a suspected class may still stand out in the student")
    ] = 1.0
    student_steps: Annotated[int, Setting("student steps per round (k)", least=1)] = 5
    batch: Annotated[int, Setting("images in a step of the student", least=4)] = 128
    groups: Annotated[
        int, Setting("triggers in a batch; each is laid on its share of the triggered images", least=1)
    ] = 8
    alpha: Annotated[float, Setting("weight of the restriction (eq. 8)")] = 1.0
    lr: Annotated[
        float, Setting("peak learning rate of the student (SGD): up for a tenth of a cycle, then down to 0")
    ] = 6e-3
    momentum: Annotated[float, Setting("momentum of the student's SGD")] = 0.9
    weight_decay: Annotated[float, Setting("weight decay of the student")] = 5e-4
    clip: Annotated[float, Setting("largest norm of the student's gradient")] = 1.25
    rise: Annotated[
        float,
        Setting("weight, beside the restriction, of how far triggers lead to their classes when a class stands out"),
    ] = 0.6
    fall: Annotated[
        float, Setting("weight, beside the distillation, of how far images of these classes fall behind")
    ] = 0.2
    harmless: Annotated[
        float, Setting("how far a class must stay behind for that not to count, in deviations of the teacher's answers")
    ] = 1.0
    trigger_share: Annotated[
        float, Setting("share of triggered images in a student batch when a class stands out", above=0, below=1)
    ] = 0.5
    trigger_share_unsuspected: Annotated[float, Setting("the same when none does", above=0, below=1)] = 0.125
    families_at_once: Annotated[
        int, Setting("families that go on seeking in the student in one round; all have their turns")
    ] = 2
    seek_images: Annotated[int, Setting("images in one step of them", least=1)] = 32
    look_every: Annotated[int, Setting("rounds between two looks at what the student still reacts to", least=1)] = 5
    gain_images: Annotated[int, Setting("images on which the triggers found are tried again", least=2)] = 16
    agreement_images: Annotated[int, Setting("images on which student and teacher are compared", least=1)] = 256
    damaged_agreement: Annotated[
        float, Setting("agreement with the teacher below which the result counts as damaged", most=1)
    ] = 0.7
    lost_agreement: Annotated[
        float, Setting("agreement with the teacher below which the student is lost, and goes back", most=1)
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
            yield from self.survey.run(teacher, state)
            self.survey.conclude(teacher, state)
            state.findings.outliers = ranks.agreed(state.findings.outliers)
            self.look(student, state, progress)
            progress.surveyed = True
        state.close(run_state)

        while not self.done(state.findings, progress.rounds):
            set_lr([learn], best.lr_scale * self.rate(progress.rounds % self.iterations))
            losses = self.step_student(student, learn, state)
            if diverged(student):
                best.restore(student, learn, slower=True)
                losses = {}
                self.look(student, state, progress)
            else:
                losses |= self.step_triggers(student, state, progress.rounds)
                if (progress.rounds + 1) % self.look_every == 0 or (progress.rounds + 1) % self.iterations == 0:
                    pixels = self.look(student, state, progress)
                    if progress.agreement < self.lost_agreement:
                        best.restore(student, learn, slower=True)
                    else:
                        best.judge(student, progress.agreement, state.bank, pixels)
            progress.rounds += 1
            if progress.rounds % self.iterations == 0 and state.findings.backdoored:
                self.search_afresh(student, learn, state, best)
            yield {**losses, "gain": state.bank.gain.amax(), "agreement": progress.agreement}
        if best.agreement == NOTHING:
            raise Failed("the run diverged, and no state of it is sound: lower --lr, or another --seed")
        student.load_state_dict(best.weights)

    def step_student(self, student: Classifier, learn: SGD, state: SurveyState) -> Round:
        """Minimises over S, k times. Both kinds of image pass at once, for no statistics move.

        The gap, a mean over all logits, hardly feels the few images that a trigger still leads to its class, and these
        are what ASR counts: where a class stands out, the rise of its margin is held down too. For its own images to be
        told still, their margin must not fall.
        """
        backdoored = state.findings.backdoored
        share = self.trigger_share if backdoored else self.trigger_share_unsuspected
        harmless = -self.harmless * state.pool.answers.std()
        least = ranks.size()  # for each process has its part of both kinds
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
        """Maximises over R: some families seek what the student still answers."""
        losses: Round = {}
        for turn in range(self.families_at_once):
            number = (self.families_at_once * round_ + turn) % len(FAMILIES)
            pixels, _ = state.pool.sample(self.seek_images)
            losses[f"margin_{FAMILIES[number].name}"] = seek(
                state.search, student, number, pixels, state.findings.suspected
            )
        return losses

    @torch.no_grad()
    def look(self, student: Classifier, state: SurveyState, progress: "Progress") -> Tensor:
        """Takes in what was found meanwhile, and notes what still acts and whether the student answers as the teacher.

        Returns:
            The images on which triggers were tried [n, c, h, w].
        """
        bank, findings = state.bank, state.findings
        pixels, _ = state.pool.sample(self.gain_images)
        for family, sought, natural in zip(state.search.families, findings.sought, findings.natural, strict=True):
            wanted = sought.nonzero().flatten()
            margin = state.search.margin(student, family, wanted, pixels)
            stronger = margin > natural
            bank.take(family.triggers(wanted[stronger]), wanted[stronger], margin[stronger])
        bank.retry(student, pixels)
        bank.gain = ranks.agreed(bank.gain)
        compared, answers = state.pool.same(self.agreement_images)
        progress.agreement = ranks.agreed((student(compared).argmax(1) == answers.argmax(1)).float().mean())
        return pixels

    def search_afresh(self, student: Classifier, learn: SGD, state: SurveyState, best: "Best") -> None:
        """Goes back to the best state, and seeks there what the first search did not find.

        How far a suspected class still stands out is noted, by the margin of squares as large as those of the survey.
        """
        best.restore(student, learn)
        left, side = [], excerpts_of(state.search).side
        for label in state.findings.suspected.nonzero().flatten().tolist():
            triggers, margins = self.survey.hunt(student, state, label)
            state.bank.take(triggers, torch.full((len(margins),), label), margins)
            squares = (triggers.keep == 0).sum((1, 2, 3)) == side**2
            left.append(state.findings.standing(margins[squares].amax()))
        state.findings.left = ranks.agreed(torch.stack(left).amax())
        state.bank.retry(student, state.pool.sample(self.gain_images)[0])

    def done(self, findings: Findings, rounds: int) -> bool:
        """Whether the run is at its end: a cycle is over, and another one is not worth it or not allowed.

        What the first fresh search of the student found is still to be unlearned, so two cycles are the least.
        """
        cycle, more = divmod(rounds, self.iterations)
        if rounds == 0 or more:
            return False
        ordinary = cycle > 1 and bool(findings.left <= self.stop_anomaly)
        return cycle == self.cycles or not findings.backdoored or ordinary

    def found(self, run_state: RunState) -> dict[str, float]:
        """How far the class that stands out most does, against `anomaly_threshold`; which it is; what acts in the end."""
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
        """What a finished run says of itself, by signs that need no data.

        - `damaged`: the cleaned model is another one.
        - `still answers`: a class that stood out does so in a fresh search of the cleaned model, or statistics accuse one
          for which no trigger was found, so that nothing could be unlearned.
        - `erased`: a class stood out, and none does any more.
        - `nothing found`: none stood out.
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
            f"statistics accuse class {label}, and no trigger of it was found: nothing of it was unlearned"
            for label in findings.unexplained.nonzero().flatten().tolist()
        ]
        weak = (findings.fused >= ACCUSED) & (findings.fused < CONVICTED) & ~findings.suspected
        said += [
            f"statistics lean against class {label} (evidence {float(findings.fused[label]):.2f}; {CONVICTED} convicts), and no "
            "trigger of it was found: nothing of it was unlearned"
            for label in weak.nonzero().flatten().tolist()
        ]
        if not findings.backdoored:
            said.append("no class stood out: the restriction was light, and a backdoor that no search finds stays")
        return said

    def check(self, shape: Shape) -> None:
        super().check(shape)
        self.survey.check(shape)
        ranks.check(self.batch)
        if self.survey.pool_size < self.batch:
            raise Refused(f"--pool-size {self.survey.pool_size}: it must hold one batch at least, {self.batch} images")

    def rate(self, iteration: int) -> float:
        """The share of the student's learning rate in force at this iteration of a cycle."""
        done = iteration / self.iterations
        return max(0.0, min((iteration + 1) / max(1, round(0.1 * self.iterations)), (1 - done) / 0.9, 1.0))

    def draw_samples(self, model: Classifier, run_state: RunState, count: int) -> Samples:
        pixels, _ = run_state.part("pool").sample(count)
        bank: TriggerBank = run_state.part("bank")
        strongest = bank.strength.argsort(descending=True)[: max(1, len(bank))]
        triggers = bank.triggers(strongest[torch.randint(len(strongest), (count,))])
        return Samples(pixels, triggers(pixels), triggers(torch.full_like(pixels, 0.5)))


def diverged(model: Classifier) -> bool:
    """Whether the sum of the squares of all weights is not finite, which happens long before an answer is not."""
    return not torch.stack([each.detach().square().sum() for each in model.parameters()]).sum().isfinite()


class Progress(Plain):
    """How far a run is."""

    def __init__(self) -> None:
        self.surveyed = False
        """The survey is concluded."""
        self.rounds = 0
        """Rounds of all cycles that are done."""
        self.agreement = torch.ones(())
        """The share of images for which student and teacher chose the same class when they were compared last."""


class Best(Plain):
    """The best state of the student so far, by signs that need no data: agreement less the gain of the strongest trigger."""

    def __init__(self, student: Classifier) -> None:
        self.weights = _copied(student)
        self.agreement, self.gain, self.lr_scale = NOTHING, 1.0, 1.0

    def judge(self, student: Classifier, agreement: Tensor, bank: TriggerBank, pixels: Tensor) -> None:
        """Keeps this state if it is as good as the best before.

        Both are tried on the same images [n, c, h, w] with all triggers of the bank: triggers are found all the time,
        and an early state that was never tried with the later ones would look better than it is.
        """
        now = _copied(student)
        if self.agreement > NOTHING:
            student.load_state_dict(self.weights)
            self.gain = float(ranks.agreed(bank.tried(student, pixels).amax()))
            student.load_state_dict(now)
        gain = float(bank.gain.amax())
        if float(agreement) - gain >= self.agreement - self.gain:
            self.agreement, self.gain, self.weights = float(agreement), gain, now

    def restore(self, student: Classifier, learn: SGD, *, slower: bool = False) -> None:
        """Goes back to the best state, without the momentum that led away from it, and perhaps more slowly from there."""
        student.load_state_dict(self.weights)
        learn.state.clear()
        self.lr_scale /= 1 + slower


def _copied(student: Classifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in student.state_dict().items()}
