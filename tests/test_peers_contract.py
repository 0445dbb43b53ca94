"""What every defence of others keeps to, on small networks of several forms."""

import copy
import io
import json
import math
import os
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dhbe import networks
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.defenses import PEERS, Defense, Known
from dhbe.errors import Refused
from dhbe.run_state import RunState
from dhbe.suspects import load

SHARED = Path(os.environ.get("DHBE_SHARED", Path(__file__).parents[2] / "shared")) / "data"

TINY = {
    "epochs": 2, "teacher_epochs": 1, "size": 16, "batch": 8, "crop": 1, "search_epochs": 2, "search_size": 16,
    "search_batch": 8, "index": 0.0, "u": 1.0, "iterations": 2, "student_steps": 1, "steps": 2, "batches": 2, "copies": 2,
    "hidden": 16, "agreement": 0.0,
}  # fmt: skip
"""Settings that take no time, and with which each defence has something to do."""

PEER = {name: kind(**{f.name: TINY[f.name] for f in fields(kind) if f.name in TINY}) for name, kind in PEERS.items()}
every = pytest.mark.parametrize("defense", PEER.values(), ids=PEER)


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


def victim(name: str = "small_vgg", classes: int = 4) -> Classifier:
    """A network whose BatchNorm layers remember something, in eval mode."""
    torch.manual_seed(0)
    network = NETWORKS[name](classes)
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(16, 3, 8, 8) + 0.3)
    return Classifier(network, shape=(3, 8, 8), classes=classes, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)).eval()


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


@pytest.mark.parametrize("network", NETWORKS)
@every
def test_victim_and_random_state_stay_and_the_result_is_a_changed_model_in_eval_mode(defense, network):
    keeps_its_promises(defense, victim(network).train(), KNOWN)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="the shared models and data are not here")
@every
def test_all_of_it_holds_for_a_network_of_strangers_too(defense):
    folder = SHARED / "victims"
    suspect = load(folder / "ibau_cifar10_smallvgg_badnets_t8.pt", arch=f"{folder}/nets.py:small_vgg")
    pixels = torch.randint(256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    lent = Images(pixels, torch.arange(20) % 10, tuple("0123456789"))
    keeps_its_promises(defense, suspect.classifier, Known(clean=lent, target=8))


def keeps_its_promises(defense: Defense, model: Classifier, known: Known) -> None:
    """The victim and the random state stay, and the result is a changed, finite model in eval mode."""
    before = copy.deepcopy(model)
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
    for module in cleaned.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert [(g.number, g.total) for g in rounds] == [(i + 1, defense.rounds) for i in range(defense.rounds)]
    assert all(value.ndim == 0 and value.isfinite() for g in rounds for value in g.round.values())


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
        assert not any(module.training for module in round_info.model.modules())
        round_info.model(torch.rand(4, 3, 8, 8)).sum()

    assert same(defense(model, KNOWN), defense(model, KNOWN, watch=watch))


@every
def test_hyperparameters_survive_json(defense):
    assert type(defense)(**json.loads(json.dumps(asdict(defense)))) == defense


@every
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(defense):
    model, saved = victim(), []

    def watch(round_info):
        torch.rand(5)
        file = io.BytesIO()
        torch.save(run_state.state(), file)
        saved.append(file.getvalue())

    run_state = RunState()
    whole = defense(model, KNOWN, seed=3, watch=watch, run_state=run_state)
    assert len(saved) == defense.rounds
    found = defense.found(run_state)
    for done, state in enumerate(saved, start=1):
        torch.rand(done)
        rest: list = []
        run_state = RunState(torch.load(io.BytesIO(state), weights_only=True))
        resumed = defense(model, KNOWN, seed=3, run_state=run_state, watch=rest.append)
        assert same(resumed, whole), f"after round {done}"
        assert [g.number for g in rest] == list(range(done + 1, defense.rounds + 1))
        assert defense.found(run_state) == found


@every
def test_bf16_runs_and_is_left_behind(defense):
    rough = defense(victim(), KNOWN, precision="bf16")
    assert all(value.isfinite().all() and value.dtype != torch.bfloat16 for value in rough.state_dict().values())


@every
def test_needs_are_enforced_and_the_rest_makes_no_difference(defense):
    model = victim()
    if "clean images" in defense.needs:
        with pytest.raises(Refused, match="needs clean images"):
            defense(model, Known(target=1))
    if "target class" in defense.needs:
        with pytest.raises(Refused, match="needs target class"):
            defense(model, Known(clean=KNOWN.clean))
    bare = Known(
        clean=KNOWN.clean if "clean images" in defense.needs else None,
        target=KNOWN.target if "target class" in defense.needs else None,
    )
    assert same(defense(model, bare), defense(model, KNOWN))


@every
def test_images_that_do_not_fit_are_refused(defense):
    if "clean images" not in defense.needs:
        pytest.skip("it is handed no images")
    other = Images(torch.zeros(9, 3, 4, 4, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64), ("a",))
    for bad in (
        other,
        images(20).subset(slice(3)),
        replace(images(), labels=images().labels * 2, names=tuple("abcdefgh")),
    ):
        with pytest.raises(Refused, match="clean images"):
            defense(victim(), Known(clean=bad, target=1))


@every
def test_bad_settings_are_refused(defense):
    defense.check((3, 8, 8))
    for field in fields(defense):
        value = getattr(defense, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            for bad in (-0.5, math.nan, math.inf):
                with pytest.raises(Refused, match=f"--{field.name.replace('_', '-')} "):
                    replace(defense, **{field.name: bad}).check((3, 8, 8))
