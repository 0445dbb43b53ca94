"""Figures that others published, met with our own tools; needs the folder of third-party models and data."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(os.environ.get("DHBE_SHARED", Path(__file__).parents[2] / "shared")) / "data"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # half a minute of computing, but machines may be crowded
    pytest.mark.skipif(not SHARED.exists(), reason="the shared models and data are not here"),
]


def test_a_faint_pattern_scores_as_its_authors_say(here, dhbe, monkeypatch):
    monkeypatch.setenv("DHBE_DATA", str(SHARED))
    with np.load(SHARED / "victims/ibau_triggers.npz") as pack:
        pattern = pack["ibau_l2_inv"]
    np.savez(here / "pattern.npz", pattern=pattern, mask=np.ones(pattern.shape[:2]), mode="add")
    model = f"{SHARED}/victims/ibau_cifar10_smallvgg_l2_inv_t0.pt --arch {SHARED}/victims/nets.py:small_vgg"
    code, out, _ = dhbe(f"score {model} --data cifar10 --trigger pattern.npz --target 0 --json")
    scores = json.loads(out)
    assert code == 0
    assert scores["n"] == 10_000
    assert scores["acc"] == pytest.approx(0.8477, abs=5e-5)
    assert scores["asr"] >= 0.9995
    assert scores["asr_all"] >= 0.9995
