import argparse
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict, defaultdict, deque
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dhbe import candidates, checkpoint, pickles
from dhbe.errors import Failed, Refused

WEIGHTS = {
    "conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2),
    "fc.weight": torch.ones(5, 2),
    "fc.bias": torch.zeros(5),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


class Calls:
    """An object that a pickle restores by calling `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def saved(content, zipped=True):
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def legacy(content):
    return saved(content, zipped=False)


def zipped(*members, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def rewritten(compression=zipfile.ZIP_STORED, **changed):
    """What torch.save writes, with members changed or added; long enough that compression is not a bomb."""
    with zipfile.ZipFile(io.BytesIO(saved(WEIGHTS))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= {f"archive/{name}": content for name, content in changed.items()}
    content = zipped(*members.items(), compression=compression)
    return content[:-2] + struct.pack("<H", 9999) + bytes(9999)  # a comment


def tensors_file(header, data=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def claiming(*shape):
    """A tensor that says it is larger than the storage it comes with."""
    typed = torch.storage.TypedStorage(
        wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float32, _internal=True
    )
    return Calls(torch._utils._rebuild_tensor_v2, typed, 0, shape, (1,) * len(shape), False, OrderedDict())


BOMB = [("m/data.pkl", b"."), ("m/data/0", bytes(10**6))]
LIE = {"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}
HUGE = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
HOSTILE = {
    "empty": (lambda: b"", "is empty"),
    "noise": (lambda: bytes(range(256)), "broken, truncated or not a checkpoint"),
    "page": (lambda: b"<!DOCTYPE html><html>not found</html>", "is a web page, not the model"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "half a zip": (lambda: saved(WEIGHTS)[:-200], "broken, truncated"),
    "half a legacy file": (lambda: legacy(WEIGHTS)[:-20], "broken, truncated"),
    "half a safetensors file": (lambda: safetensors.torch.save(WEIGHTS)[:-20], "broken, truncated"),
    "safetensors that lies": (lambda: tensors_file(LIE, b"1234"), "broken, truncated"),
    "safetensors too large": (lambda: tensors_file(HUGE), "broken, truncated"),
    "torchscript": (lambda: zipped(("m/data.pkl", b""), ("m/constants.pkl", b"")), "TorchScript"),
    "pt2": (lambda: zipped(("archive_format", b"pt2"), ("models/model.json", b"{}")), "not of torch.save"),
    "zip bomb": (lambda: zipped(*BOMB, compression=zipfile.ZIP_DEFLATED), "would unpack to 1000001: .* zip bomb"),
    "compressed": (lambda: rewritten(compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "other byte order": (lambda: rewritten(byteorder=b"big"), "byte order of another machine"),
    "other byte order, hidden": (lambda: rewritten(BYTEORDER=b"big"), "byte order of another machine"),
    "two pickles": (lambda: rewritten(**{"DATA.PKL": b"."}), "which has one data.pkl"),
    "expanded": (lambda: saved({"a": torch.zeros(1).expand(10**12)}), "claim 4000000000000"),
    "expanded, legacy": (lambda: legacy({"a": torch.zeros(1).expand(10**12)}), "claim 4000000000000"),
    "tied too often": (lambda: saved(dict.fromkeys("abcdefgh", torch.ones(10**4))), "refused as a bomb"),
    "claims more": (lambda: saved({"a": claiming(5)}), "broken, truncated"),
    "claims more, legacy": (lambda: legacy({"a": claiming(5)}), "broken, truncated"),
    "claims far more, legacy": (lambda: legacy({"a": claiming(10**13)}), "refused as a bomb"),
    "allocates": (lambda: saved({"a": torch.ones(1), "b": Calls(bytearray, 10**13)}), r"asks to import .*\.bytearray"),
    "sparse": (lambda: saved({"a": torch.eye(2).to_sparse()}), "holds sparse, quantised or"),
    "meta": (lambda: saved({"a": torch.ones(2, device="meta")}), "other special tensors .*_rebuild_meta"),
    "complex": (lambda: saved({"a": torch.ones(2, dtype=torch.complex64)}), "a .torch.complex64"),
    "float8": (lambda: safetensors.torch.save({"a": torch.ones(2).to(torch.float8_e4m3fn)}), "a .torch.float8_e4m3fn"),
    "nan": (lambda: saved(WEIGHTS | {"bn.bias": torch.tensor([1, torch.nan])}), "NaN or infinite weights in bn.bias"),
    "inf": (lambda: safetensors.torch.save({"w": torch.tensor([torch.inf]).half()}), "NaN or infinite weights in w"),
    "terminal": (lambda: saved({"\x1b[2J\n": torch.tensor([torch.nan])}), r"weights in \\x1b\[2J\\n:"),
    "network": (lambda: saved(Net()), rf"whole pickled network.*\({__name__}\.Net, .*state_dict"),
    "network, legacy": (lambda: legacy({"model": nn.DataParallel(Net())}), rf"pickled network.*\({__name__}\.Net, "),
    "torch's own network": (lambda: saved(nn.Sequential(nn.Linear(1, 1))), "pickled network.*container.Sequential"),
    "a list": (lambda: saved([torch.ones(1)]), "holds a list"),
    "no tensors": (
        lambda: saved({"epoch": 3, "optimizer": {}}),
        r"no tensors in a state dict \(keys: epoch, optimizer",
    ),
    "several": (
        lambda: saved({"student": WEIGHTS, "teacher": dict(WEIGHTS)}),
        "add `weights` with one of student, teacher",
    ),
    "mixed": (lambda: saved({"net": WEIGHTS | {"epoch": 3, "losses": [0.5]}}), r"plain tensors: losses \(list\)"),
    "numbered": (lambda: saved({1: torch.ones(1)}), r"<int> \(torch.float32\)"),
    "protocol 4": (lambda: pickle.dumps({"a": 1}, 4), "broken, truncated or not a checkpoint"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_one_line(case, tmp_path, recwarn):
    make, message = HOSTILE[case]
    path = tmp_path / "model.pt"
    path.write_bytes(make())
    recwarn.clear()
    with pytest.raises(Refused, match=message) as caught:
        checkpoint.read(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()
    assert "weights_only" not in str(caught.value)  # torch's advice is to switch the protection off
    assert not recwarn.list


@pytest.mark.parametrize(
    "wrap", [lambda evil: evil, lambda evil: {"state_dict": {**WEIGHTS, "a": evil}}], ids=["bare", "nested"]
)
@pytest.mark.parametrize(
    "write",
    [saved, legacy, *(lambda content, protocol=protocol: pickle.dumps(content, protocol) for protocol in (0, 2, 4, 5))],
    ids=["zip", "legacy", "protocol 0", "protocol 2", "protocol 4", "protocol 5"],
)
@pytest.mark.parametrize("function", [os.system, eval])
def test_no_payload_is_ever_run(function, write, wrap, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "model.pth"
    payload = {os.system: f"touch {canary}", eval: f"open({str(canary)!r}, 'w').close()"}[function]
    content = write(wrap(Calls(function, payload)))
    path.write_bytes(content)
    with pytest.raises(Refused, match=r"system|builtin(s|__)\.eval") as caught:
        checkpoint.read(path)
    assert "nothing was run" in str(caught.value)
    assert not canary.exists()


def test_the_payload_would_have_run(tmp_path):
    pickle.loads(pickle.dumps(Calls(os.system, f"touch {tmp_path / 'canary'}")))
    assert (tmp_path / "canary").exists()


def test_numpy_in_a_file_cannot_change_numpy_here(tmp_path):
    hostile = Calls(np.dtype, "i8")
    hostile.reduced += ((3, "<", None, None, None, -1, -1, 63),)  # these flags would make a pointer of every integer
    (tmp_path / "model.pt").write_bytes(saved({"net": WEIGHTS, "epoch": hostile}))
    checkpoint.read(tmp_path / "model.pt")
    assert not np.dtype("i8").hasobject


def test_objects_beside_the_weights_are_neither_imported_nor_called(tmp_path, monkeypatch):
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda *_, **__: pytest.fail("called"))
    monkeypatch.setattr(argparse.Namespace, "__setstate__", lambda *_: pytest.fail("called"), raising=False)
    settings = argparse.Namespace.__new__(argparse.Namespace)
    settings.lr = 0.1
    (tmp_path / "model.pt").write_bytes(saved({"net": WEIGHTS, "args": settings}))
    assert checkpoint.read(tmp_path / "model.pt").tensors.keys() == WEIGHTS.keys()
    settings.hook = Calls(os.system, f"touch {tmp_path / 'canary'}")
    (tmp_path / "model.pt").write_bytes(saved({"net": WEIGHTS, "args": settings}))
    with pytest.raises(Refused, match="system; nothing was run"):
        checkpoint.read(tmp_path / "model.pt")
    assert not (tmp_path / "canary").exists()


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "secret").symlink_to(tmp_path)
    for name, message in [
        (".", "is a folder"),
        ("fifo", "not a regular file"),
        ("loop", "cannot read"),
        ("dangling", "o such file"),
        ("nowhere", "o such file"),
        ("secret", "a link to .* is a folder"),
        ("/dev/zero", "not a regular file"),
        ("nul\0", "cannot read"),
    ]:
        with pytest.raises(Refused, match=message):
            checkpoint.read(tmp_path / name)


def test_links_to_files_are_followed_because_model_caches_consist_of_them(tmp_path):
    (tmp_path / "blob").write_bytes(saved(WEIGHTS))
    (tmp_path / "model.pt").symlink_to("blob")
    assert checkpoint.read(tmp_path / "model.pt").tensors.keys() == WEIGHTS.keys()


NUMBERS = {
    "epoch": 3,
    "best": np.float64(0.5),
    "history": np.arange(3),
    "steps": [np.float32(1), np.int64(2)],
    "lr": (0.1, None),
}
DEFAULTS = defaultdict(list, a=[1])
OBJECTS = [
    argparse.Namespace(lr=0.1, data=Path("/data")), SimpleNamespace(a=1), Path("a") / "b", PureWindowsPath("c:/x"), {1, 2},
    frozenset({1}), DEFAULTS, deque([1], 3), datetime.now(UTC), date(2020, 1, 1), timedelta(1),
]  # fmt: skip
ACCEPTED = {
    "objects": (
        {"model": WEIGHTS, "args": OBJECTS, **{str(place): each for place, each in enumerate(OBJECTS)}},
        "model",
    ),
    "bare": (WEIGHTS, ""),
    "lightning": ({"state_dict": WEIGHTS, "pytorch-lightning_version": "2.0"}, "state_dict"),
    "numbers": ({"model": WEIGHTS, **NUMBERS}, "model"),
    "optimizer": ({"net": WEIGHTS, "optimizer": {"state": {0: {"m": torch.ones(2)}}, "param_groups": [{}]}}, "net"),
    "ordered": ({"model_state_dict": OrderedDict(WEIGHTS)}, "model_state_dict"),
    "own name": ({"netC": WEIGHTS, "grid": torch.ones(1)}, "netC"),
    "parameters": ({key: nn.Parameter(value) for key, value in WEIGHTS.items()}, ""),
}


@pytest.mark.parametrize("write", [saved, legacy])
@pytest.mark.parametrize("case", ACCEPTED)
def test_what_training_scripts_write_is_read(case, write, tmp_path):
    content, where = ACCEPTED[case]
    (tmp_path / "model.th").write_bytes(write(content))
    state = checkpoint.read(tmp_path / "model.th")
    assert state.where == where
    assert list(state.tensors) == list(WEIGHTS)
    for key, tensor in state.tensors.items():
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, WEIGHTS[key])


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module."],
    ids=lambda prefix: prefix or "none",
)
def test_wrappers_are_stripped_for_loading_and_kept_for_saving(prefix, tmp_path):
    source, network = Net(), Net()
    torch.save({prefix + key: value for key, value in source.state_dict().items()}, tmp_path / "in.pt")
    state = checkpoint.read(tmp_path / "in.pt")
    assert state.prefix == prefix
    assert list(state.plain) == list(source.state_dict())
    state = checkpoint.load_into(network, state)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in network.state_dict().items())
    checkpoint.save(tmp_path / "out.safetensors", network.state_dict(), state, {"made": "here"})
    again = checkpoint.read(tmp_path / "out.safetensors")
    assert again.tensors.keys() == state.tensors.keys()


def test_a_vendors_own_self_model_is_not_taken_for_a_wrapper(tmp_path):
    network = nn.Sequential(OrderedDict(model=nn.Linear(2, 3)))
    torch.save(nn.DataParallel(network).state_dict(), tmp_path / "in.pt")
    state = checkpoint.read(tmp_path / "in.pt")
    assert state.prefix == "module.model."
    state = checkpoint.load_into(network, state)
    checkpoint.save(tmp_path / "out.safetensors", network.state_dict(), state, {})
    assert torch.equal(
        checkpoint.read(tmp_path / "out.safetensors").tensors["module.model.weight"], network.model.weight
    )


DTYPES = sorted(pickles.DTYPES, key=str)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda key: key not in candidates.PLACES and key.isprintable()),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 3), max_size=4)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([saved, legacy, safetensors.torch.save]),
)
def test_any_state_dict_survives_reading_and_saving(tmp_path, kinds, write):
    tensors = {key: (torch.randn(shape) * 9).to(dtype) for key, (dtype, shape) in kinds.items()}
    (tmp_path / "in").write_bytes(write(tensors))
    state = checkpoint.read(tmp_path / "in")
    checkpoint.save(tmp_path / "out", state.tensors, state, {"a": "b"})
    for loaded in (state.tensors, checkpoint.read(tmp_path / "out").tensors):
        assert loaded.keys() == tensors.keys()
        for key, tensor in loaded.items():
            assert (tensor.dtype, tensor.shape) == (tensors[key].dtype, tensors[key].shape)
            assert torch.equal(tensor, tensors[key])


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([saved, legacy, safetensors.torch.save]), st.lists(st.tuples(st.integers(0), st.integers(0, 255)))
)
def test_damage_anywhere_is_refused_or_harmless(tmp_path, write, hits):
    content = bytearray(write(WEIGHTS))
    for place, value in hits:
        content[place % len(content)] = value
    (tmp_path / "in").write_bytes(content)
    with suppress(Refused):
        state = checkpoint.read(tmp_path / "in")
        assert all(tensor.float().isfinite().all() for tensor in state.tensors.values())


def test_a_vendors_loading_code_that_raises_is_one_line():
    network = Net()
    network.register_load_state_dict_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(Refused, match="loading the weights into the network fails: ZeroDivisionError"):
        checkpoint.load_into(network, checkpoint.State(Net().state_dict(), "", "", ""))


def test_misfits_are_listed_by_name_and_shape():
    fine = Net().state_dict()
    wrong = {key: value for key, value in fine.items() if key != "conv.bias"} | {
        "fc.bias": torch.ones(7),
        "head": torch.ones(1),
    }
    with pytest.raises(Refused) as caught:
        checkpoint.load_into(Net(), checkpoint.State(wrong, "", "", ""))
    for part in ("missing: conv.bias [4]", "unexpected: head [1]", "wrong shape: fc.bias [7] for [5]"):
        assert part in str(caught.value)
    with pytest.raises(Refused, match=r"unexpected: .* and 97 more"):
        checkpoint.load_into(Net(), checkpoint.State(fine | {f"x{i}": torch.ones(1) for i in range(100)}, "", "", ""))


def test_old_half_precision_weights_compute_in_float32_and_return_as_they_came(tmp_path):
    old = {key: value.half() for key, value in Net().state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "in.pt")
    state, network = checkpoint.read(tmp_path / "in.pt"), Net()
    state = checkpoint.load_into(network, state)
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    network.to(memory_format=torch.channels_last)
    checkpoint.save(tmp_path / "out.safetensors", network.state_dict(), state, {})
    assert {
        key: value.dtype for key, value in checkpoint.read(tmp_path / "out.safetensors").tensors.items()
    } == dict.fromkeys(old, torch.float16)
    network.bn.running_var[0] = 1e6  # finite, but not in float16
    with pytest.raises(Failed, match=r"bn\.running_var is not finite in torch\.float16"):
        checkpoint.save(tmp_path / "never", network.state_dict(), state, {})
    assert not (tmp_path / "never").exists()


def test_tied_weights_are_read_and_saved(tmp_path):
    shared = torch.randn(50, 4)
    torch.save({"a": shared, "b": shared, "c": shared[10:]}, tmp_path / "in.pt")
    state = checkpoint.read(tmp_path / "in.pt")
    checkpoint.save(tmp_path / "out.safetensors", {"a": shared, "b": shared, "c": shared[10:]}, state, {})
    assert torch.equal(checkpoint.read(tmp_path / "out.safetensors").tensors["b"], shared)
