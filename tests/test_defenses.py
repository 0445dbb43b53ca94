"""What every defence keeps to."""

import copy
import dataclasses
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import pytest
import torch
from conftest import MEAN, STD, tiny, victim
from torch import nn

from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.defenses import PRESETS, Defense, Known
from dhbe.defenses.dhbe import PAPER
from dhbe.defenses.fast import FastDHBE
from dhbe.errors import Refused
from dhbe.run_state import RunState
from dhbe.steps import descend

DEFENSES = {
    **{name: tiny(settings) for name, settings in PRESETS.items()},
    "own places": tiny(replace(PAPER, places="sample")),
}
every = pytest.mark.parametrize("defense", DEFENSES.values(), ids=DEFENSES)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@every
def test_victim_and_random_state_stay_and_the_result_is_in_eval_mode(defense):
    model = victim().train()
    model.network[1].eval()
    before = copy.deepcopy(model)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rounds = []
    cleaned = defense(model, watch=rounds.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module.training for module in cleaned.modules())
    assert not same(cleaned, model)
    assert all(value.isfinite().all() for value in cleaned.state_dict().values())
    assert len({p.data_ptr() for p in [*cleaned.parameters(), *model.parameters()]}) == 2 * len([*model.parameters()])
    assert [(round_info.number, round_info.total) for round_info in rounds] == [
        (i + 1, defense.rounds) for i in range(len(rounds))
    ]
    assert 0 < len(rounds) <= defense.rounds  # `fast` may stop before
    assert all(value.ndim == 0 and value.isfinite() for round_info in rounds for value in round_info.round.values())


@every
def test_random_state_stays_also_when_the_watcher_stops_the_run(defense):
    model = victim()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        defense(model, watch=lambda round_info: (_ for _ in ()).throw(RuntimeError))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.ones(()).device.type == "cpu"


@every
def test_the_seed_settles_everything(defense):
    model = victim()
    torch.manual_seed(11)
    first = defense(model, seed=3)
    torch.manual_seed(12)
    assert same(first, defense(model, seed=3))
    assert not same(first, defense(model, seed=4))


@every
def test_looking_changes_nothing(defense):
    model = victim()

    def watch(round_info):
        torch.manual_seed(99)
        torch.rand(3)
        assert not any(module.training for module in round_info.model.modules())
        round_info.model(torch.rand(4, 3, 8, 8))
        defense.samples(round_info.model, round_info.run_state, 6, seed=round_info.number)

    assert same(defense(model), defense(model, watch=watch))


@every
def test_scenes_are_the_same_for_a_seed_and_show_what_is_said(defense):
    model, run_state = victim(), RunState()
    defense(model, run_state=run_state)
    state = torch.get_rng_state()
    samples, again = (defense.samples(model, run_state, 7, seed=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("pixels", "triggered", "patches"):
        assert torch.equal(getattr(samples, name), getattr(again, name))
        assert not getattr(samples, name).requires_grad
    assert samples.pixels.shape == samples.triggered.shape == (7, 3, 8, 8)
    side = 8 if isinstance(defense, FastDHBE) else 3  # its triggers are shown on grey images
    assert samples.patches.shape == (7, 3, side, side)
    assert 0 <= samples.patches.min() <= samples.patches.max() <= 1
    changed = (samples.triggered - samples.pixels).abs().amax(1) > 1e-5
    assert 0 < changed.sum((1, 2)).max() <= side**2


@every
def test_hyperparameters_survive_json(defense):
    assert type(defense)(**json.loads(json.dumps(asdict(defense)))) == defense


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@every
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(defense, precision):
    model, saved, curves = victim(), [], []

    def watch(round_info):
        torch.rand(5)
        file = io.BytesIO()
        torch.save(run_state.state(), file)
        saved.append(file.getvalue())
        curves.append({name: value.item() for name, value in round_info.round.items()})

    run_state = RunState()
    whole = defense(model, seed=3, precision=precision, watch=watch, run_state=run_state)
    for done, state in enumerate(saved, start=1):
        torch.rand(done)
        rest = []
        run_state = RunState(torch.load(io.BytesIO(state), weights_only=True))
        resumed = defense(model, seed=3, precision=precision, run_state=run_state, watch=rest.append)
        assert same(resumed, whole), f"after round {done}"
        assert [g.number for g in rest] == list(range(done + 1, len(saved) + 1))
        assert [{name: value.item() for name, value in g.round.items()} for g in rest] == curves[done:]


@every
def test_bf16_is_left_behind(defense):
    model = victim()
    exact, rough = defense(model), defense(model, precision="bf16")
    assert not same(exact, rough)
    assert all(value.isfinite().all() for value in rough.state_dict().values())
    assert all(value.dtype != torch.bfloat16 for value in rough.state_dict().values())
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


@dataclass(frozen=True)
class Fitting(Defense):
    """Learns to answer with -1 by gradient descent on a square, which cannot be done with the weights of long ago."""

    name: ClassVar[str] = "fitting"
    needs: ClassVar[frozenset] = frozenset()

    @property
    def rounds(self) -> int:
        return 30

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[dict[str, torch.Tensor]]:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        images = torch.rand(32, 3, 8, 8)
        run_state.keep(model=model, optimizer=optimizer)
        for _ in range(self.rounds):
            with torch.no_grad():
                model(images)
            loss = (model(images) + 1).square().mean()
            descend(optimizer, loss)
            yield {"loss": loss}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_step_sees_the_weights_of_the_step_before(precision):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    losses = []
    Fitting()(
        Classifier(network, shape=(3, 8, 8), classes=4, mean=MEAN, std=STD),
        precision=precision,
        watch=lambda round_info: losses.append(round_info.round["loss"].item()),
    )
    assert losses[0] > 2
    assert losses[-1] < 0.5


@every
def test_bad_settings_are_refused(defense):
    defense.check((3, 8, 8))
    defense.check((1, 28, 28))
    for shape in ((3, 8, 9), (3, 7, 7), (2, 8, 8), (4, 8, 8)):
        with pytest.raises(Refused, match="--input"):
            defense.check(shape)
    bad = {"patch": (0, 9, -1), "batch": (0, -4), "iterations": (0,), "student_steps": (0,), "album": (0,)}
    for field in dataclasses.fields(defense):
        if isinstance(getattr(defense, field.name), int | float) and field.type is not bool:
            for value in (*bad.get(field.name, ()), -0.5, math.nan, math.inf):
                if isinstance(getattr(defense, field.name), bool):
                    continue
                with pytest.raises(Refused, match=f"--{field.name.replace('_', '-')} "):
                    replace(defense, **{field.name: value}).check((3, 8, 8))


@pytest.mark.parametrize("settings", [{"batch": 1}, {"batch": 2}, {"batch": 3}, {"album": 2}], ids=str)
@every
def test_what_is_not_refused_runs(defense, settings):
    names = {field.name for field in dataclasses.fields(defense)}
    if not settings.keys() <= names:
        pytest.skip("not a setting of this defence")
    defense = replace(defense, patch=1, **settings)
    try:
        defense.check((3, 8, 8))
    except Refused:
        return
    assert all(value.isfinite().all() for value in defense(victim()).state_dict().values())


IMAGES = Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), ("a", "b", "c", "d"))


@dataclass(frozen=True)
class Curious(Defense):
    """SurveyState what it is handed."""

    name: ClassVar[str] = "curious"
    needs: ClassVar[frozenset] = frozenset()
    handed: ClassVar[list[Known]] = []

    @property
    def rounds(self) -> int:
        return 1

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[dict[str, torch.Tensor]]:
        assert all(module.training for module in model.modules())
        self.handed.append(known)
        run_state.keep(model=model)
        yield {}


class NeedsImages(Curious):
    needs = frozenset({"clean images"})


class NeedsAll(Curious):
    needs = frozenset({"clean images", "target class"})


def test_a_defence_is_handed_what_it_needs_and_nothing_else():
    everything = Known(clean=IMAGES, target=0)
    Curious.handed.clear()
    for kind in (Curious, NeedsImages, NeedsAll):
        kind()(victim(), everything)
    assert Curious.handed == [Known(), Known(clean=IMAGES), everything]
    Curious.handed.clear()
    for lacking in (Known(), Known(target=1)):
        with pytest.raises(Refused, match="needs clean images"):
            NeedsImages()(victim(), lacking)
    with pytest.raises(Refused, match="needs target class"):
        NeedsAll()(victim(), Known(clean=IMAGES))
    assert Curious.handed == []


@every
def test_erasers_need_nothing_and_clean_images_make_no_difference(defense):
    assert defense.needs == frozenset()
    assert same(defense(victim()), defense(victim(), Known(clean=IMAGES, target=1)))
