"""Neural Cleanse on a model that a third party backdoored; needs the folder of third-party models and data."""

import os
from pathlib import Path

import pytest

from dhbe import records

SHARED = Path(os.environ.get("DHBE_SHARED", Path(__file__).parents[2] / "shared")) / "data"


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not SHARED.exists(), reason="the shared models and data are not here")
def test_neural_cleanse_names_the_class_of_a_third_party_backdoor_and_repairs_it(here, dhbe, monkeypatch):
    """A network that flattens its features, so that the trigger works at its place only; 2000 training images."""
    monkeypatch.setenv("DHBE_DATA", str(SHARED))
    model = f"{SHARED}/victims/ibau_cifar10_smallvgg_badnets_t8.pt --arch {SHARED}/victims/nets.py:small_vgg"
    trigger = "--trigger badnets:4:white:27,27 --target 8"
    code, _, errors = dhbe(f"defend neural-cleanse {model} --data cifar10 {trigger} --images 2000 --out out --quiet")
    assert code == 0, errors
    record = records.read(Path("out/record.json"))
    assert record.before.asr > 0.95
    assert record.before.signs["suspected_class"] == 8
    assert record.before.signs["anomaly_index"] > 2
    assert record.after.asr <= 0.1
    assert record.before.acc - record.after.acc <= 0.03
