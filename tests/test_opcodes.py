"""Pickles made by hand, opcode by opcode, that would exhaust the process which reads them."""

import io
import pickle
import random
import re
import struct
import time
from collections import Counter, OrderedDict

import pytest
import torch
from conftest import saved, small_state
from hypothesis import given, settings
from hypothesis import strategies as st

from dhbe import checkpoint, opcodes
from dhbe.errors import Refused
from tests.fuzz import mutations

PROTO, STOP = b"\x80\x02", b"."
ORDERED, COUNTER, SIZE = b"ccollections\nOrderedDict\n", b"ccollections\nCounter\n", b"ctorch\nSize\n"
FLOATS = b"ctorch\nFloatStorage\n"
DEEP = b")" + b"\x85" * 100_000
"""A tuple in a tuple in a tuple ..."""

SHARED = b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(40))
"""A tuple of twice the one before, forty times."""


def text(content: str) -> bytes:
    return b"X" + struct.pack("<I", len(content.encode())) + content.encode()


def number(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def storage(count: int, key: str = "0") -> bytes:
    return b"(" + text("storage") + FLOATS + text(key) + text("cpu") + number(count) + b"tQ"


def rebuilt(shape: bytes) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(1) + b"K\x00" + shape + b")\x89" + ORDERED + b")Rt" + b"R"


def keys(count: int, each) -> bytes:
    return b"}(" + b"".join(each(i) + b"K\x00" for i in range(count)) + b"u"


REFUSED = {
    "deep key": (b"}" + DEEP + b"K\x01s", "more than 100 deep"),
    "deep item": (ORDERED + b"](" + DEEP + b"K\x01tatR", "more than 100 deep"),
    "deep lists": (b"]" * 200 + b"a" * 199, "more than 100 deep"),
    "shared key": (b"}" + SHARED + b"K\x01s", "with everything shared expanded"),
    "shared in a counter": (COUNTER + b"](" + SHARED + b"e\x85R", "with everything shared expanded"),
    "shared prefix": (b"(" + SHARED + b"K\x01K\x02K\x03K\x04tQ", "with everything shared expanded"),
    "holds itself": (b"]q\x00h\x00a", "holds itself"),
    "round a corner": (b"]q\x00(h\x00ta", "changes after it was put into another"),
    "equal hashes": (keys(20_000, lambda i: number(i * (2**61 - 1) + 2**61)), "keys that are neither texts nor"),
    "many tuples": (keys(20_000, lambda i: b"J" + struct.pack("<i", i) + b"\x85"), "keys that are neither texts nor"),
    "pairs": (ORDERED + b"](" + b"K\x01K\x02\x86" * 20_000 + b"e\x85R", "keys that are neither texts nor"),
    "many steps": (b"N" * 500_001, "more than 500,000 steps"),
    "many tensors": (b"(" + rebuilt(b")") * 20_001 + b"t", "more than 20,000 tensors"),
    "dimensions": (rebuilt(b"(" + b"K\x01" * 65 + b"t"), "more than 64 dimensions"),
    "dimensions of a size": (SIZE + b"(" + b"K\x01" * 65 + b"t\x85R", "more than 64 dimensions"),
    "a storage that is called": (FLOATS + number(2**40) + b"\x85R", "a storage without a file"),
    "a claim": (storage(2**40), "its tensors claim 4398046511104"),
    "many claims": (b"".join(storage(10, str(i)) for i in range(1000)), "its tensors claim"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_exhaust_the_process_is_refused_at_once(case):
    content, message = REFUSED[case]
    began = time.process_time()
    with pytest.raises(Refused, match=message):
        opcodes.check(io.BytesIO(PROTO + content + STOP), 1, 1000)
    assert time.process_time() - began < 8


def test_a_text_that_claims_more_than_the_file_has_gets_no_buffer(tmp_path):
    path = tmp_path / "model.pt"
    for opcode, length in ((b"\x8e", "<Q"), (b"X", "<I"), (b"\x8b", "<i"), (b"\x96", "<Q")):
        path.write_bytes(
            PROTO
            + opcode
            + struct.pack(length, 2**31 - 1 if length == "<i" else 2 ** (8 * struct.calcsize(length) - 2))
        )
        with pytest.raises(Refused, match="broken, truncated or not a checkpoint"):
            checkpoint.read(path)


NONSENSE = {
    "a method of what was made": ORDERED + b")R)R",
    "items of a number": b"K\x01K\x02K\x03s",
    "items of a tensor": rebuilt(b")") + b"K\x01K\x02s",
    "attributes that hide methods": ORDERED + b")R}" + text("items") + b"K\x01sb",
    "attributes of a tensor": rebuilt(b")") + b"}b",
    "a tensor not by its function": b"ctorch\nFloatTensor\n)\x81",
    "another encoding": b"c_codecs\nencode\n" + text("a") + text("idna") + b"\x86R",
    "a storage of no class": b"(" + text("storage") + b"K\x01" * 4 + b"tQ",
    "nothing to take": b"0",
    "nothing to remember": b"h\x07",
    "a set": b"\x8f",
}


@pytest.mark.parametrize("case", NONSENSE)
def test_what_torch_never_writes_is_not_read(case):
    with pytest.raises((ValueError, LookupError)):
        opcodes.check(io.BytesIO(PROTO + NONSENSE[case] + STOP), 1, 1000)


def optimised():
    """A checkpoint as training scripts write it, with all that torch adds."""
    network = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    history = [{"loss": 1.0, "epochs": (1, 2)} for _ in range(1000)]
    return {
        "net": network.state_dict(), "optimizer": optimiser.state_dict(), "milestones": Counter({30: 1, 60: 1}),
        "history": history, "shape": torch.Size([1, 2]), "raw": b"\x00\xff", "size": 2**70, "none": None,
        "pairs": OrderedDict([((1, 2), 3)]), "parameters": {"w": network.weight}, "dtype": torch.float16,
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("content", [small_state(), optimised()], ids=["weights", "checkpoint"])
def test_what_training_scripts_write_passes(content, zipped):
    written = saved(content, _use_new_zipfile_serialization=zipped)
    if zipped:
        found = torch._C.PyTorchFileReader(io.BytesIO(written)).get_record("data.pkl")
        opcodes.check(io.BytesIO(found), 1, len(written))
    else:
        opcodes.check(io.BytesIO(written), 5, len(written))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text())
NESTED = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner) | st.tuples(inner, inner))


@settings(deadline=None, max_examples=60)
@given(NESTED)
def test_plain_containers_of_any_form_pass(content):
    written = pickle.dumps(content, 2)
    opcodes.check(io.BytesIO(written), 1, len(written))


def inside(content) -> bytes:
    return torch._C.PyTorchFileReader(io.BytesIO(saved(content))).get_record("data.pkl")


@pytest.mark.parametrize("seed", range(2))
def test_generated_pickles_pass_or_are_refused_as_what_they_are(seed):
    rng, whole = random.Random(seed), [inside(optimised()), inside({"a": torch.ones(2)})]
    came_to, said = Counter(), []
    for _ in range(60):
        made = rng.choice([mutations.by_hand, mutations.by_hand, lambda rng: mutations.opcodes(rng, rng.choice(whole))])
        try:
            opcodes.check(io.BytesIO(made(rng)), 1, 1000)
            came_to["passed"] += 1
        except Refused as refusal:
            said.append(str(refusal))
        except (ValueError, LookupError):
            came_to["nonsense"] += 1
    assert min(came_to["passed"], came_to["nonsense"], len(said)) >= 1, (came_to, said)
    assert all(
        re.fullmatch("(would expand to|has 1000 bytes, but .* claim) .*: refused as a bomb", each) for each in said
    )
