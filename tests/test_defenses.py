"""What every defence keeps to, ours and those of others, on small networks of several forms."""

import copy
import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import MEAN, STD, tiny, victim
from torch import nn

from dhbe import networks, settings
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.defenses import PEERS, PRESETS, Defense, Eraser, FastDHBE, Known
from dhbe.defenses.dhbe import PAPER
from dhbe.errors import Refused
from dhbe.run_state import RunState
from dhbe.steps import descend
from dhbe.suspects import load

SHARED = Path(os.environ.get("DHBE_SHARED", Path(__file__).parents[2] / "shared")) / "data"

QUICK = {
    "epochs": 2, "teacher_epochs": 1, "size": 16, "batch": 8, "crop": 1, "search_epochs": 2, "search_size": 16,
    "search_batch": 8, "index": 0.0, "u": 1.0, "iterations": 2, "student_steps": 1, "steps": 2, "batches": 2, "copies": 2,
    "hidden": 16, "agreement": 0.0,
}  # fmt: skip
"""Settings of peers that take no time, and with which each defence has something to do."""

ERASERS = {
    **{name: tiny(defense) for name, defense in PRESETS.items()},
    "own places": tiny(replace(PAPER, places="sample")),
}
PEER = {name: settings.changed(kind(), QUICK) for name, kind in PEERS.items()}
DEFENSES: dict[str, Defense] = {**ERASERS, **PEER}
every = pytest.mark.parametrize("defense", DEFENSES.values(), ids=DEFENSES)
every_eraser = pytest.mark.parametrize("defense", ERASERS.values(), ids=ERASERS)


def images(count: int = 24, classes: int = 4) -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % classes, tuple("abcd"[:classes]))


KNOWN = Known(clean=images(), target=1)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_every_peer_is_listed_under_its_own_name_and_says_where_it_comes_from():
    for name, kind in PEERS.items():
        assert kind.name == name
        assert "20" in (kind.__doc__ or ""), f"{name} names no source with its year"
        assert kind.needs <= {"clean images", "target class"}


def small_vgg(classes: int) -> nn.Module:
    """The form of a common third-party victim: ELU, dropout, flattened features, two kinds of layers in a row."""
    layers: list[nn.Module] = []
    for inputs, width in ((3, 6), (6, 8)):
        layers += [nn.Conv2d(inputs, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ELU(), nn.MaxPool2d(2), nn.Dropout(0.4)]
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(8 * 4, classes))


NETWORKS = {
    "small_vgg": small_vgg,
    "resnet8": lambda classes: networks.build("resnet8", classes, (3, 8, 8)),
    "wrn16-1": lambda classes: networks.build("wrn16-1", classes, (3, 8, 8)),
}


def remembering(name: str, classes: int = 4) -> Classifier:
    """A network of a form whose BatchNorm layers remember something."""
    torch.manual_seed(0)
    network = NETWORKS[name](classes)
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(16, 3, 8, 8) + 0.3)
    return Classifier(network, shape=(3, 8, 8), classes=classes, mean=MEAN, std=STD).eval()


@pytest.mark.parametrize("network", NETWORKS)
@every
def test_victim_and_random_state_stay_and_the_result_is_a_changed_model_in_eval_mode(defense, network):
    model = remembering(network).train()
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    keeps_its_promises(defense, model, KNOWN)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="the shared models and data are not here")
@pytest.mark.parametrize("defense", PEER.values(), ids=PEER)
def test_all_of_it_holds_for_a_third_party_network_too(defense):
    folder = SHARED / "victims"
    suspect = load(folder / "ibau_cifar10_smallvgg_badnets_t8.pt", arch=f"{folder}/nets.py:small_vgg")
    pixels = torch.randint(256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    lent = Images(pixels, torch.arange(20) % 10, tuple("0123456789"))
    keeps_its_promises(defense, suspect.classifier, Known(clean=lent, target=8))


def keeps_its_promises(defense: Defense, model: Classifier, known: Known) -> None:
    """The victim and the random state stay, and the result is a changed, finite model in eval mode."""
    before = copy.deepcopy(model)
    torch.manual_seed(5)
    state, rounds = torch.get_rng_state(), []
    cleaned = defense(model, known, watch=rounds.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module.training for module in cleaned.modules())
    assert all(p.requires_grad for p in cleaned.parameters())
    assert cleaned.state_dict().keys() == model.state_dict().keys()
    assert not same(cleaned, model)
    assert all(value.isfinite().all() for value in cleaned.state_dict().values())
    assert len({p.data_ptr() for p in [*cleaned.parameters(), *model.parameters()]}) == 2 * len([*model.parameters()])
    for module in cleaned.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert [(each.number, each.total) for each in rounds] == [(i + 1, defense.rounds) for i in range(len(rounds))]
    assert 0 < len(rounds) <= defense.rounds
    assert len(rounds) == defense.rounds or isinstance(defense, FastDHBE)  # which may stop before
    assert all(value.ndim == 0 and value.isfinite() for each in rounds for value in each.round.values())


@every
def test_random_state_stays_also_when_the_watcher_stops_the_run(defense):
    model, state = victim(), torch.get_rng_state()
    with pytest.raises(InterruptedError):
        defense(model, KNOWN, watch=lambda round_info: (_ for _ in ()).throw(InterruptedError))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.ones(()).device.type == "cpu"


@every
def test_the_seed_settles_everything(defense):
    model = victim()
    torch.manual_seed(11)
    first = defense(model, KNOWN, seed=3)
    torch.manual_seed(12)
    assert same(first, defense(model, KNOWN, seed=3))
    if defense.name != "clp":  # it draws nothing
        assert not same(first, defense(model, KNOWN, seed=4))


@every
def test_looking_changes_nothing(defense):
    model = victim()

    def watch(round_info):
        torch.manual_seed(99)
        torch.rand(3)
        assert not any(module.training for module in round_info.model.modules())
        round_info.model(torch.rand(4, 3, 8, 8)).sum()
        if isinstance(defense, Eraser):
            defense.samples(round_info.model, round_info.run_state, 6, seed=round_info.number)

    assert same(defense(model, KNOWN), defense(model, KNOWN, watch=watch))


@every_eraser
def test_samples_are_the_same_for_a_seed_and_show_what_is_said(defense):
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
    recorded = json.loads(json.dumps(settings.flat(defense)))
    assert settings.changed(type(defense)(), recorded) == defense


@pytest.mark.parametrize(
    ("defense", "precision"),
    [(each, "fp32") for each in DEFENSES.values()] + [(each, "bf16") for each in ERASERS.values()],
    ids=[*DEFENSES, *(f"{name} bf16" for name in ERASERS)],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(defense, precision):
    model, saved, curves = victim(), [], []

    def watch(round_info):
        torch.rand(5)
        file = io.BytesIO()
        torch.save(run_state.state(), file)
        saved.append(file.getvalue())
        curves.append({name: value.item() for name, value in round_info.round.items()})

    run_state = RunState()
    whole = defense(model, KNOWN, seed=3, precision=precision, watch=watch, run_state=run_state)
    found = defense.found(run_state)
    for done, state in enumerate(saved, start=1):
        torch.rand(done)
        rest = []
        run_state = RunState(torch.load(io.BytesIO(state), weights_only=True))
        resumed = defense(model, KNOWN, seed=3, precision=precision, run_state=run_state, watch=rest.append)
        assert same(resumed, whole), f"after round {done}"
        assert [each.number for each in rest] == list(range(done + 1, len(saved) + 1))
        assert [{name: value.item() for name, value in each.round.items()} for each in rest] == curves[done:]
        assert defense.found(run_state) == found


@every
def test_a_saved_run_that_lacks_a_part_or_has_another_is_refused(defense):
    saved, run_state = [], RunState()
    defense(victim(), KNOWN, run_state=run_state, watch=lambda round_info: saved.append(run_state.state()))
    parts = saved[0]["parts"]
    name = next(iter(parts))
    for odd in ({k: v for k, v in parts.items() if k != name}, parts | {"more": {}}, parts | {name: {}}):
        with pytest.raises(Refused, match="`overwrite`"):
            defense(victim(), KNOWN, run_state=RunState({**saved[0], "parts": odd}))


@every
def test_bf16_is_left_behind(defense):
    model = victim()
    rough = defense(model, KNOWN, precision="bf16")
    if isinstance(defense, Eraser):
        assert not same(rough, defense(model, KNOWN))
    assert all(value.isfinite().all() and value.dtype != torch.bfloat16 for value in rough.state_dict().values())
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


@every
def test_settings_out_of_bounds_are_refused(defense):
    defense.check((3, 8, 8))
    if isinstance(defense, Eraser):
        defense.check((1, 28, 28))
        for shape in ((3, 8, 9), (3, 7, 7), (2, 8, 8), (4, 8, 8)):
            with pytest.raises(Refused, match="`input_shape="):
                defense.check(shape)
    values = settings.flat(defense)
    counted = {"patch", "batch", "iterations", "student_steps", "pool_size", "epochs", "steps"}
    for field in settings.described(type(defense)):
        value = values[field.name]
        if isinstance(value, int | float) and not isinstance(value, bool):
            bad = [-0.5, math.nan, math.inf] + ([0, -4] if field.name in counted else [])
            for number in [*bad, 9] if field.name == "patch" else bad:
                with pytest.raises(Refused, match=f"`{field.name}` "):
                    settings.changed(defense, {field.name: number}).check((3, 8, 8))


@pytest.mark.parametrize("changes", [{"batch": 1}, {"batch": 2}, {"batch": 3}, {"batch": 4}, {"pool_size": 2}], ids=str)
@every_eraser
def test_what_is_not_refused_runs(defense, changes):
    if not changes.keys() <= settings.flat(defense).keys():
        pytest.skip("not a setting of this defence")
    defense = settings.changed(defense, {"patch": 1, **changes})
    try:
        defense.check((3, 8, 8))
    except Refused:
        return
    assert all(value.isfinite().all() for value in defense(victim()).state_dict().values())


@every
def test_needs_are_enforced_and_the_rest_makes_no_difference(defense):
    model = victim()
    if "clean images" in defense.needs:
        with pytest.raises(Refused, match="needs clean images"):
            defense(model, Known(target=1))
    if "target class" in defense.needs:
        with pytest.raises(Refused, match="needs target class"):
            defense(model, Known(clean=KNOWN.clean))
    if isinstance(defense, Eraser):
        assert defense.needs == frozenset()
    bare = Known(
        clean=KNOWN.clean if "clean images" in defense.needs else None,
        target=KNOWN.target if "target class" in defense.needs else None,
    )
    assert same(defense(model, bare), defense(model, KNOWN))


@pytest.mark.parametrize(
    "defense", [each for each in PEER.values() if "clean images" in each.needs], ids=lambda d: d.name
)
def test_images_that_do_not_fit_are_refused(defense):
    other = Images(torch.zeros(9, 3, 4, 4, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64), ("a",))
    for bad in (
        other,
        images(20).subset(slice(3)),
        replace(images(), labels=images().labels * 2, names=tuple("abcdefgh")),
    ):
        with pytest.raises(Refused, match="clean images"):
            defense(victim(), Known(clean=bad, target=1))


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
        run_state.register(model=model, optimizer=optimizer)
        for _ in range(run_state.restore(), self.rounds):
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


@dataclass(frozen=True)
class Curious(Defense):
    """Notes what it is handed."""

    name: ClassVar[str] = "curious"
    needs: ClassVar[frozenset] = frozenset()
    handed: ClassVar[list[Known]] = []

    @property
    def rounds(self) -> int:
        return 1

    def run(self, model: Classifier, known: Known, run_state: RunState) -> Iterator[dict[str, torch.Tensor]]:
        assert all(module.training for module in model.modules())
        self.handed.append(known)
        run_state.register(model=model)
        yield {}


class NeedsImages(Curious):
    needs = frozenset({"clean images"})


class NeedsAll(Curious):
    needs = frozenset({"clean images", "target class"})


class UsesPictures(Curious):
    uses = frozenset({"pictures"})


def test_a_defence_is_handed_what_it_needs_and_nothing_else():
    Curious.handed.clear()
    known = replace(KNOWN, pictures=(torch.zeros(3, 8, 8, dtype=torch.uint8),))
    for kind in (Curious, NeedsImages, NeedsAll, UsesPictures):
        kind()(victim(), known)
    assert Curious.handed == [Known(), Known(clean=KNOWN.clean), KNOWN, Known(pictures=known.pictures)]
