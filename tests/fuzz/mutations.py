"""Inputs that nobody should have to read: mutated real ones, and pickles and archives made by hand."""

import io
import json
import pickletools
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

Rng = random.Random


class Touches:
    """An object whose pickle leaves a file behind where it is opened carelessly."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return open, (self.canary, "w")


def saved(content: object, *, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def packed(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


# Of any bytes.


def flips(rng: Rng, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 2, 8, 64])):
        place = rng.randrange(min(len(changed), rng.choice([64, 1024, 10**9])))
        changed[place] = rng.choice([rng.randrange(256), 0, 255, changed[place] ^ 1 << rng.randrange(8)])
    return bytes(changed)


def cut(rng: Rng, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def spliced(rng: Rng, content: bytes) -> bytes:
    start, length, place = rng.randrange(len(content)), rng.randrange(1, 200), rng.randrange(len(content))
    return content[:place] + content[start : start + length] * rng.choice([1, 1, 2, 1000]) + content[place:]


def dropped(rng: Rng, content: bytes) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randrange(1, 100) :]


def sizes(rng: Rng, content: bytes) -> bytes:
    """A number of four or eight bytes becomes an extreme one."""
    form = rng.choice(["<I", "<Q", ">I"])
    value = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(content)])
    place = rng.randrange(max(1, len(content) - 8))
    return content[:place] + struct.pack(form, value) + content[place + struct.calcsize(form) :]


ANY = [flips, flips, cut, spliced, dropped, sizes]


# Of pickles.


def text(content: str) -> bytes:
    raw = content.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def atom(rng: Rng) -> bytes:
    return rng.choice([
        b"N", b"\x88", b"\x89", b")", b"]", b"}", b"K" + bytes([rng.randrange(256)]),
        b"J" + struct.pack("<i", rng.randrange(-(2**31), 2**31)), b"G" + struct.pack(">d", rng.uniform(-9, 9)),
        b"\x8a\x09" + bytes(rng.randrange(256) for _ in range(9)), text(rng.choice(["a", "weight", "", "\x1b[2J", "é" * 99])),
        b"ctorch\nFloatStorage\n", b"ctorch\nfloat32\n", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n",
        b"ccollections\nCounter\n", b"c_codecs\nencode\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_parameter\n", b"cnumpy.core.multiarray\nscalar\n", b"ctorch\ndevice\n",
        b"cos\nsystem\n", b"cbuiltins\nbytearray\n",
    ])  # fmt: skip


def deep(rng: Rng) -> bytes:
    depth = rng.choice([50, 200, 5000, 200_000])
    return rng.choice([b")" + b"\x85" * depth, b"K\x01" + b"\x85" * depth, b"]" * depth + b"a" * (depth - 1)])


def shared(rng: Rng) -> bytes:
    levels = rng.choice([5, 20, 26, 40, 100])
    kind = rng.choice([b"\x86", b"\x86", b"\x87"])
    again = 1 if kind == b"\x86" else 2
    return b"K\x01" + b"".join(b"q" + bytes([i]) + (b"h" + bytes([i])) * again + kind for i in range(levels))


def long(rng: Rng) -> bytes:
    count = rng.choice([100, 10_000, 300_000])
    return rng.choice([
        lambda: b"(" + b"K\x01" * count + b"t",
        lambda: b"](" + b"N" * count + b"e",
        lambda: b"}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(min(count, 60_000))) + b"u",
        lambda: b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"\x85N" for i in range(min(count, 60_000))) + b"u",
        lambda: text("a" * count * 10),
    ])()  # fmt: skip


def storage(rng: Rng) -> bytes:
    size = rng.choice([1, 4, 2**20, 2**31, 2**40, 2**62])
    number = size.to_bytes(9, "little")
    kind = rng.choice([b"ctorch\nFloatStorage\n", b"ctorch\nDoubleStorage\n", b"ctorch.storage\nUntypedStorage\n"])
    return b"(" + text("storage") + kind + text(str(rng.randrange(3))) + text("cpu") + b"\x8a\x09" + number + b"tQ"


def tensor(rng: Rng) -> bytes:
    shape = rng.choice(
        [b")", b"K\x02\x85", b"(" + b"K\x01" * rng.choice([5, 70, 200_000]) + b"t", long(rng), deep(rng)]
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(rng) + b"K\x00" + shape + rng.choice([b")", shape])
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def value(rng: Rng) -> bytes:
    return rng.choice([atom, atom, deep, shared, long, storage, tensor])(rng)


def by_hand(rng: Rng) -> bytes:
    """A pickle that no `torch.save` wrote."""

    def inside() -> bytes:
        return rng.choice([
            lambda: b"}" + value(rng) + value(rng) + b"s",
            lambda: b"ccollections\nOrderedDict\n](" + value(rng) + value(rng) + b"\x86e\x85R",
            lambda: b"ccollections\nOrderedDict\n)R" + value(rng) + value(rng) + b"s",
            lambda: b"ccollections\nOrderedDict\n)R}" + text(rng.choice(["items", "get", "_metadata"])) + value(rng) + b"sb",
            lambda: b"ccollections\nCounter\n" + value(rng) + b"\x85R",
            lambda: b"(" + value(rng) + value(rng) + text("0") + text("cpu") + b"K\x01tQ",
            lambda: b"}" + text("state_dict") + b"}(" + text("a") + tensor(rng) + text("b") + value(rng) + b"us",
            lambda: b"c_codecs\nencode\n" + value(rng) + text(rng.choice(["latin1", "idna", "zlib"])) + b"\x86R",
            lambda: b"ctorch\nFloatStorage\n" + storage(rng) + b"\x85R",
            lambda: b"ctorch.storage\nUntypedStorage\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R",
            lambda: b"ctorch\nSize\n" + value(rng) + b"\x85R",
            lambda: value(rng) + value(rng) + rng.choice([b"R", b"\x81", b"b", b"a", b"s", b"\x86"]),
        ])()  # fmt: skip

    return b"\x80" + bytes([rng.choice([2, 2, 2, 4])]) + inside() + b"."


def opcodes(rng: Rng, content: bytes) -> bytes:
    """Some opcodes of a pickle left out, doubled, exchanged or put in."""
    places = [place for _, _, place in pickletools.genops(content)] + [len(content)]
    parts = [content[a:b] for a, b in pairwise(places)]
    for _ in range(rng.choice([1, 1, 3, 10])):
        at = rng.randrange(len(parts))
        rng.choice([
            lambda at=at: parts.pop(at) if len(parts) > 1 else None,
            lambda at=at: parts.insert(at, parts[at]),
            lambda at=at: parts.insert(at, rng.choice(parts)),
            lambda at=at: parts.insert(at, value(rng)),
            lambda at=at: parts.insert(at, rng.choice([b"R", b"\x81", b"b", b"Q", b"u", b"e", b"t", b"(", b"s", b"\x85"])),
        ])()  # fmt: skip
    return b"".join(parts)


# Of zips.


def rezipped(rng: Rng, content: bytes, *, pickled: Callable[[bytes], bytes] | None = None) -> bytes:
    """The members of a zip, some of them changed, written again."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    if pickled:
        members = [(name, pickled(data) if name.endswith("data.pkl") else data) for name, data in members]
    else:
        at = rng.randrange(len(members))
        name, data = members[at]
        members[at : at + 1] = rng.choice([
            [], [(name, data)] * 2, [(name.upper(), data), (name, data)], [(name, bytes(10**7))], [(f"../{name}", data)],
            [(name, data[: len(data) // 2])], [(f"x/{name}", data)], [(name, flips(rng, data) if data else b"x")],
            [("archive/constants.pkl", b"."), (name, data)], [("archive/byteorder", b"big"), (name, data)],
        ])  # fmt: skip
    stream = io.BytesIO()
    kind = rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(stream, "w", kind) as archive:
            for name, data in members:
                archive.writestr(name, data)
    return stream.getvalue()


# Of JSON and safetensors.


def json_value(rng: Rng) -> object:
    nested: object = 1
    for _ in range(rng.choice([3, 50])):
        nested = [nested]
    return rng.choice([
        None, True, -1, 0, 2**70, 1e308, "", "x" * 1000, "\x1b[2J\u202e", [], {}, nested, [0] * 10_000, {"a": nested},
        [[1], [1, 2]], "NaN",
    ])  # fmt: skip


def rewritten(rng: Rng, content: object) -> object:
    """A value somewhere inside replaced, left out or added."""
    if isinstance(content, dict) and content and rng.random() < 0.8:
        key = rng.choice(list(content))
        what = rng.random()
        if what < 0.15:
            return {k: v for k, v in content.items() if k != key}
        if what < 0.25:
            return {**content, rng.choice(["x", "\x1b", "a" * 999]): json_value(rng)}
        return {**content, key: rewritten(rng, content[key])}
    if isinstance(content, list) and content and rng.random() < 0.6:
        at = rng.randrange(len(content))
        return [*content[:at], rewritten(rng, content[at]), *content[at + 1 :]]
    return json_value(rng)


def header(rng: Rng, content: bytes) -> bytes:
    """The header of a safetensors file, changed; its length told rightly, or not."""
    length = int.from_bytes(content[:8], "little")
    head, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    changed = rng.choice([
        lambda: rewritten(rng, head),
        lambda: {**head, "many": {"dtype": "F32", "shape": [1] * rng.choice([70, 300_000]), "data_offsets": [0, 4]}},
        lambda: {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(rng.choice([10, 60_000]))},
        lambda: {**head, "__metadata__": {"dhbe": json.dumps(json_value(rng))}},
        lambda: {**head, "__metadata__": {"dhbe": json.dumps(label(rng))}},
    ])()  # fmt: skip
    raw = json.dumps(changed).encode()
    told = rng.choice([len(raw)] * 6 + [0, 2**63, len(raw) + 10**6, len(raw) - 1])
    return struct.pack("<Q", told) + raw + data


def label(rng: Rng) -> dict:
    whole = {"arch": "resnet8", "classes": 3, "input": [3, 16, 16], "mean": [0.5], "std": [0.25]}
    return rng.choice([
        {**whole, "input": [3, 1024, 1024]}, {**whole, "classes": 100_000}, {**whole, "arch": "vendor.py:net"},
        {**whole, "arch": "\x1b[2J"}, {**whole, "mean": [0.5] * 1000}, {**whole, "std": [0.0]}, {**whole, "std": [1e-300]},
        {**whole, "input": [1024, 8, 8]}, {**whole, "arch": "resnet34-64"},
    ])  # fmt: skip
