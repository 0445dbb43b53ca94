"""What a user sees of a run that goes on."""

import time

import pytest
import torch
from conftest import tiny, victim

from dhbe.defenses import FastDHBE
from dhbe.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `time.monotonic` returns, as a list of one."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_time_between_rounds_does_not_count_for_the_seconds_left(clock, capsys):
    with Progress(10, "erasing", quiet=False) as progress:
        for number in (1, 2):
            clock[0] += 20
            progress.round(number, {})
        for step in range(1, 31):
            clock[0] += 10
            progress.part("deep images", step, 30)
        clock[0] += 20
        progress.round(3, {})
    lines = capsys.readouterr().err.splitlines()
    assert [line.strip() for line in lines] == [
        "erasing: 1 of at most 10",
        "erasing: 2 of at most 10, 3 min left",
        *(f"erasing: deep images, {step} of 30" for step in range(1, 31)),
        "erasing: 3 of at most 10, 2 min left",
    ]


def test_nothing_is_shown_quietly_and_not_more_than_a_line_in_ten_seconds(clock, capsys):
    for quiet, expected in ((True, 0), (False, 3)):
        clock[0] = 0
        with Progress(10, "erasing", quiet=quiet) as progress:
            for step in range(1, 31):
                clock[0] += 1
                progress.part("deep images", step, 30)
        assert len(capsys.readouterr().err.splitlines()) == expected


def test_a_run_tells_of_its_work_between_rounds_and_is_the_same_for_it():
    defense, told = tiny(FastDHBE(), anomaly_threshold=0.0), []
    cleaned = defense(victim(), tell=lambda *step: told.append((*step, torch.rand(()))[:3]))
    names = [name for name, _, _ in told]
    assert names[0] == "statistics of all classes"
    assert {"deep images", "excerpts of each class", "refining what stands out", "scattered pixels"} <= set(names)
    assert "deep images" in names[names.index("testing the triggers found") :], "the hunts after a cycle"
    for name, step, total in told:
        assert 1 <= step <= total, name
    assert {name for name, step, total in told if step == total} == set(names)
    alone = defense(victim()).state_dict()
    assert all(torch.equal(value, alone[name]) for name, value in cleaned.state_dict().items())
