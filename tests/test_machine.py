"""What is asked of the machine, and what follows."""

import pytest
import torch

from dhbe.api import machine

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "bf16"),
        ({"amx_bf16": False, "avx512_bf16": True}, "bf16"),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, "fp32"),
        ({"neon": True}, "fp32"),
    ],
)
def test_bf16_is_taken_where_the_processor_multiplies_in_it(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert machine.precision("auto", CPU, exact=False) == expected
    assert machine.precision("auto", CPU, exact=True) == "fp32"
    assert machine.precision("bf16", CPU, exact=True) == "bf16"
    assert machine.precision("fp32", CPU, exact=False) == "fp32"


def test_a_device_of_another_kind_computes_in_fp32_whatever_the_processor_can(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert machine.precision("auto", torch.device("mps"), exact=False) == "fp32"
    assert machine.device_name(torch.device("mps")) == "mps"


def test_a_version_of_torch_that_cannot_tell_computes_in_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert machine.precision("auto", CPU, exact=False) == "fp32"
