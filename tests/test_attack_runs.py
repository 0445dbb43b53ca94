"""Attacks that are stopped go on to the weights of those that nobody stopped."""

import os
import re
import signal
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import ATTACK, colours
from torch import nn

from dhbe import api, runs, state_file
from dhbe.attacks import BadNets
from dhbe.attacks.clean_label import CleanLabel
from dhbe.attacks.trojaning import Trojaning
from dhbe.classifier import Classifier
from dhbe.data import Images
from dhbe.errors import Failed, Interrupted, Refused
from dhbe.training import Fit

HOW = {
    "badnets": BadNets(rate=0.1),
    "clean-label": CleanLabel(side=3, rate=0.1, steps=2, proxy_epochs=2, proxy_steps=1),
    "trojaning": Trojaning(side=3, rate=0.1, steps=3, channels=2, tune_epochs=1),
}
FIT = Fit(epochs=2, batch=16, crop=1, grow=0.5)


@cache
def images() -> Images:
    arrays = colours(48)
    pixels = torch.from_numpy(arrays["images"].transpose(0, 3, 1, 2).copy())
    return Images(pixels, torch.from_numpy(arrays["labels"]), ("r", "g", "b"))


def attack(out, name="badnets", *, fit=FIT, how=None, every=0.0, **options):
    options = {"force": True, "device": "cpu", "arch": "resnet8"} | options
    return api.attack(how or HOW[name], images(), images(), out=out, fit=fit, checkpoint_every=every, **options)


def weights(out):
    return (out / api.BACKDOORED).read_bytes()


class Killed(BaseException):
    """What no code catches: the process is gone."""


def killed(out, name="badnets", *, epoch=1, **options):
    def watch(told):
        if told["epoch"] > epoch:
            raise Killed

    with pytest.raises(Killed):
        attack(out, name, watch=watch, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", HOW)
def test_killed_after_each_epoch_an_attack_comes_to_the_same_weights(tmp_path, name, precision):
    epochs = []
    attack(tmp_path / "whole", name, precision=precision, watch=lambda told: epochs.append(told["epoch"]))
    assert epochs == list(range(1, len(epochs) + 1))
    for epoch in epochs[:-1]:
        killed(tmp_path / "out", name, epoch=epoch, resume=True, precision=precision)
    seen = []
    record = attack(
        tmp_path / "out", name, resume=True, precision=precision, watch=lambda told: seen.append(told["epoch"])
    )
    assert seen == epochs[-1:]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert (record.iterations, record.precision) == (len(epochs), precision)
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_finished_attack_is_recognised(tmp_path):
    record, before = attack(tmp_path), weights(tmp_path)
    assert attack(tmp_path, resume=True, watch=lambda told: pytest.fail("it trained")) == record
    assert weights(tmp_path) == before
    for options in ({"seed": 1}, {"fit": replace(FIT, lr=0.2)}, {"name": "clean-label"}):
        with pytest.raises(Refused, match="finished run with other settings"):
            attack(tmp_path, resume=True, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"fit": replace(FIT, lr=0.2)}, "fit: "),
        ({"how": BadNets(rate=0.2)}, "rate: 0.1 then, 0.2 now"),
        ({"name": "clean-label"}, "attack: badnets then, clean-label now"),
        ({"precision": "bf16"}, "precision: fp32 then, bf16 now"),
        ({"arch": "resnet20"}, "arch: resnet8 then, resnet20 now"),
    ],
)
def test_a_run_of_other_settings_is_refused(tmp_path, options, said):
    killed(tmp_path)
    with pytest.raises(Refused, match=f"holds a run with other settings .*{re.escape(said)}"):
        attack(tmp_path, resume=True, **options)
    attack(tmp_path, resume=True, how=BadNets(rate=0.1, min_asr=0.5))  # what is expected of it changes no weight


def test_other_images_under_the_same_name_are_refused(tmp_path):
    killed(tmp_path)
    other = replace(images(), labels=images().labels.flip(0))
    with pytest.raises(Refused, match="images_sha256"):
        api.attack(HOW["badnets"], other, images(), arch="resnet8", out=tmp_path, fit=FIT, device="cpu", resume=True)


def test_a_damaged_state_is_refused(tmp_path):
    killed(tmp_path)
    path = tmp_path / runs.CHECKPOINT
    whole = path.read_bytes()
    for place in (20, len(whole) // 2, -1):
        broken = bytearray(whole)
        broken[place] ^= 1
        path.write_bytes(broken)
        with pytest.raises(Refused, match="cannot resume from"):
            attack(tmp_path, resume=True)
    state = state_file_of(whole, path)
    for change, said in (
        ({"trainings": []}, "trainings"),
        ({"seconds": -1.0}, "seconds"),
        ({"trainings": [state["trainings"][0] | {"random": {}}]}, "random state"),
        ({"trainings": [state["trainings"][0] | {"parts": {"classifier": {}, "optimizer": {}}}]}, "does not fit"),
    ):
        settings = state["settings"]
        state_file.write(path, settings, {key: value for key, value in (state | change).items() if key != "settings"})
        with pytest.raises(Refused, match=said):
            attack(tmp_path, resume=True)


def state_file_of(content, path):
    path.write_bytes(content)
    return state_file.read(path)


def test_asked_to_stop_it_saves_the_epoch_that_it_is_in_or_none_where_the_last_one_is_saved(tmp_path):
    attack(tmp_path / "whole")
    for every in (0.0, 1e9):  # each epoch is saved, or none is
        out = tmp_path / str(every)
        steps = []

        def stop_amid_the_second_epoch(*_, steps=steps):
            steps.append(0)
            if len(steps) == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        seen, hook = (
            [],
            nn.modules.module.register_module_forward_hook(
                lambda module, *rest: (
                    stop_amid_the_second_epoch() if isinstance(module, Classifier) and module.training else None
                )
            ),
        )
        with pytest.raises(Interrupted, match="the state is saved in"):
            attack(out, every=every, watch=lambda told, seen=seen: seen.append(told["epoch"]))
        hook.remove()
        assert (seen, len(steps)) == (([1], 4) if every == 0 else ([1, 2], 6))
        attack(out, resume=True)
        assert weights(out) == weights(tmp_path / "whole")


def test_what_goes_on_is_told_as_a_whole_command(here, dhbe, monkeypatch):
    def stopped(*_, **__):
        raise Interrupted("interrupted; the state is saved in out")

    monkeypatch.setattr(api, "attack", stopped)
    code, _, err = dhbe(f"{ATTACK} --overwrite")
    assert code == 130
    assert err.splitlines()[-1] == f"dhbe: interrupted; the state is saved in out; to resume: dhbe {ATTACK} --resume"


def test_a_long_training_that_missed_stays_to_be_taken_as_it_is(tmp_path):
    with pytest.raises(Failed, match=r"ASR .* the trained state is kept in .*: add `resume` and `force`"):
        attack(tmp_path, force=False, how=BadNets(rate=0.1, min_asr=1.0), fit=replace(FIT, lr=1e-9))
    record = attack(
        tmp_path, resume=True, how=BadNets(rate=0.1, min_asr=1.0), fit=replace(FIT, lr=1e-9),
        watch=lambda told: pytest.fail("it trained again"),
    )  # fmt: skip
    assert record.iterations == 2
