"""What the preset `fast` promises beside the contract of all defences."""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny, victim

from dhbe.defenses.fast import FastDHBE
from dhbe.errors import Refused
from dhbe.run_state import RunState


def test_fast_keeps_the_teachers_statistics_and_its_rate_rises_and_falls():
    fast, model = tiny(FastDHBE()), victim()
    cleaned = fast(model)
    for (name, before), after in zip(model.state_dict().items(), cleaned.state_dict().values(), strict=True):
        kept = "running" in name or "tracked" in name
        assert torch.equal(before, after) == kept, name
    rates = [FastDHBE(iterations=100).rate(i) for i in range(100)]
    assert np.argmax(rates) == 9
    assert rates[9] == 1
    assert np.all(np.diff(rates[:10]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)
    assert 0 < rates[-1] < 0.02


def test_fast_answers_in_the_pool_are_the_teachers():
    model, run_state = victim(), RunState()
    tiny(FastDHBE())(model, run_state=run_state)
    pool = run_state.part("pool")
    with torch.no_grad():
        answers = model(pool.pixels.float() / 255)
    torch.testing.assert_close(pool.answers, answers)
    assert pool.answers.std() > 0.1


def test_fast_moves_only_the_generators_while_it_warms_up():
    model, states = victim(), []
    tiny(FastDHBE())(model, watch=lambda round_info: states.append(copy.deepcopy(round_info.model.state_dict())))
    moved = [
        any(not torch.equal(a, b) for a, b in zip(s.values(), model.state_dict().values(), strict=True)) for s in states
    ]
    assert moved == [False, False, True, True, True]


@pytest.mark.parametrize("warm_up", [0, 1, 2])
def test_fast_shows_the_student_no_image_before_the_teacher_has_answered(warm_up):
    fast = tiny(FastDHBE(), warm_up=warm_up, student_steps=1)
    try:
        fast.check((3, 8, 8))
    except Refused:
        assert warm_up == 0
        return
    losses = []
    fast(victim(), watch=lambda round_info: losses.append(round_info.round))
    assert losses[warm_up]["distillation"] < 0.05  # as yet the two are the same


@pytest.mark.parametrize(
    ("backdoored", "left", "evidence", "agreement", "verdict"),
    [
        (True, 0.5, 2.0, 0.9, "erased"),
        (True, 9.0, 2.0, 0.9, "still answers"),
        (True, 0.5, 6.0, 0.9, "still answers"),  # of another class
        (False, 0.0, 0.0, 0.95, "nothing found"),
        (False, 0.0, 6.0, 0.95, "still answers"),
        (True, 0.5, 2.0, 0.4, "damaged"),
    ],
)
def test_a_run_judges_itself(backdoored, left, evidence, agreement, verdict):
    defense, run_state = tiny(FastDHBE()), RunState()
    defense(victim(), run_state=run_state)
    findings, best = run_state.part("findings"), run_state.part("best")
    findings.outliers[:] = False
    findings.outliers[0, 1] = backdoored
    findings.left, best.agreement = torch.tensor(left), agreement
    findings.evidence[:] = evidence
    assert defense.verdict(run_state) == verdict
