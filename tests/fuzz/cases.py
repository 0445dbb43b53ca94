"""Which inputs there are, and how each is read: by the functions that the command line reads it with."""

import functools
import io
import json
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from dhbe import networks, records, report, state_file, suspects
from dhbe.api import course
from dhbe.attacks.triggers import parse
from dhbe.data import load
from tests.fuzz import mutations as m

SHAPE = (3, 16, 16)
LABEL = {"arch": "resnet8", "classes": 3, "input": list(SHAPE), "mean": [0.5], "std": [0.25]}


@dataclass(frozen=True)
class Case:
    """One input: its name, its bytes, and what reads it."""

    name: str
    content: bytes
    read: Callable[[Path], object]


def case(seed: int, number: int, canary: str) -> Case:
    """The input of that number; equal seeds give equal inputs."""
    rng = random.Random(f"{seed} {number}")
    kinds = (model, model, model, model, model, trigger, trigger, data, data, record, state)
    return kinds[number % len(kinds)](rng, canary)


def model(rng: random.Random, canary: str) -> Case:
    made = rng.choice([_zip, _zip, _legacy, _pickle, _pickle, _safetensors])
    content = made(rng, canary)
    suffix = ".safetensors" if made is _safetensors and rng.random() < 0.9 else ".pt"
    return Case(f"model{suffix}", content, lambda path: suspects.load(path, input_shape=rng.choice([None, SHAPE])))


@functools.cache
def weights() -> dict:
    torch.manual_seed(0)
    return networks.build("resnet8", 3, SHAPE).state_dict()


@functools.cache
def bombs() -> dict[str, bytes]:
    """Small files that unpack to hundreds of megabytes."""
    images = np.zeros((500, 1024, 1024, 3), np.uint8)
    return {
        "trigger": m.packed(True, pattern=images[:300, :, :, 0], mask=np.ones((16, 16))),
        "data": m.packed(True, images=images, labels=np.zeros(500, int)),
    }


@functools.cache
def checkpoints() -> list[object]:
    """What training scripts save; the last holds a payload."""
    small = {"conv.weight": torch.ones(2, 3, 1, 1), "fc.weight": torch.ones(5, 2), "fc.bias": torch.zeros(5)}
    extra = {"epoch": 3, "best": np.float64(0.5), "lr": (0.1, None), "history": [1.0] * 9, "raw": b"\x00\xff"}
    return [weights(), small, {"net": small, **extra}, {"state_dict": weights(), **extra}, {"net": small, "x": None}]


def _content(rng: random.Random, canary: str) -> object:
    chosen = rng.choice(checkpoints())
    return {**chosen, "x": m.Touches(canary)} if "x" in chosen else chosen


def _zip(rng: random.Random, canary: str) -> bytes:
    whole = m.saved(_content(rng, canary))
    return rng.choice([
        lambda: rng.choice(m.ANY)(rng, whole),
        lambda: m.rezipped(rng, whole),
        lambda: m.rezipped(rng, whole, pickled=lambda inside: m.opcodes(rng, inside)),
        lambda: m.rezipped(rng, whole, pickled=lambda inside: m.flips(rng, inside)),
        lambda: m.rezipped(rng, whole, pickled=lambda inside: m.by_hand(rng)),
        lambda: m.rezipped(rng, whole, pickled=lambda inside: m.by_hand(rng)),
    ])()  # fmt: skip


def _legacy(rng: random.Random, canary: str) -> bytes:
    whole = m.saved(_content(rng, canary), zipped=False)
    third = whole.index(b"type_sizes")
    start = whole.index(b".\x80", third) + 1
    return rng.choice([
        lambda: rng.choice(m.ANY)(rng, whole),
        lambda: whole[:start] + m.opcodes(rng, whole[start:]),
        lambda: whole[:start] + m.by_hand(rng) + pickle.dumps(["0"], 2),
    ])()  # fmt: skip


def _pickle(rng: random.Random, canary: str) -> bytes:
    if rng.random() < 0.2:
        return m.flips(rng, pickle.dumps(m.Touches(canary), rng.choice([0, 2, 4])))
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + m.by_hand(rng) + pickle.dumps([], 2)


def _safetensors(rng: random.Random, canary: str) -> bytes:
    whole = safetensors.torch.save(rng.choice([weights(), checkpoints()[1]]), {"dhbe": json.dumps(LABEL)})
    return rng.choice([*m.ANY, m.header, m.header, m.header])(rng, whole)


def trigger(rng: random.Random, canary: str) -> Case:
    name = rng.choice(["badnets:3", "lsb:2", "warp", "refool", "sig", "blend"])
    made = parse(name, SHAPE)
    if rng.random() < 0.6:
        whole = made.to_json()
        content = rng.choice([
            lambda: rng.choice(m.ANY)(rng, whole.encode()),
            lambda: json.dumps(m.rewritten(rng, json.loads(whole))).encode(),
            lambda: json.dumps(m.rewritten(rng, json.loads(whole))).encode(),
            lambda: b"[" * rng.choice([10, 100_000]),
        ])()  # fmt: skip
        return Case("t.json", content, _triggered)
    if rng.random() < 0.1:
        return Case("t.npz", bombs()["trigger"], _triggered)
    whole = rng.choice([
        made.to_npz(),
        m.packed(pattern=np.zeros((16, 16, 3), np.uint8), mask=np.ones((16, 16))),
        m.packed(pattern=np.zeros((16, 16, 3), np.uint8), mask=np.full((16, 16), np.nan), mode=np.array("add")),
    ])  # fmt: skip
    return Case("t.npz", rng.choice([*m.ANY, m.rezipped])(rng, whole), _triggered)


def _triggered(path: Path) -> object:
    return parse(str(path), SHAPE)(torch.full((2, *SHAPE), 0.5))


def data(rng: random.Random, canary: str) -> Case:
    if rng.random() < 0.05:
        return Case("d.npz", bombs()["data"], lambda path: load(str(path), "all", SHAPE))
    images, labels = np.zeros((30, 16, 16, 3), np.uint8), np.arange(30) % 3
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(images[0]).save(encoded, rng.choice(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
    file = np.frombuffer(encoded.getvalue(), np.uint8)
    whole = rng.choice([
        lambda: m.packed(images=images, labels=labels),
        lambda: m.packed(True, images=images, labels=labels),
        lambda: m.packed(images=images, labels=labels - rng.choice([1, -(2**40)])),
        lambda: m.packed(images=np.array([m.Touches(canary)], object), labels=labels[:1]),
        lambda: m.packed(data=np.tile(file, 3), offsets=np.arange(4) * len(file), labels=labels[:3]),
        lambda: m.packed(
            data=np.frombuffer(m.flips(rng, file.tobytes()), np.uint8), offsets=np.array([0, len(file)]), labels=labels[:1]
        ),
        lambda: m.packed(data=np.tile(file, 3), offsets=np.array([0, 2**62, 2**63 - 1]), labels=labels[:2]),
    ])()  # fmt: skip
    change = rng.choice([*m.ANY, m.rezipped, m.rezipped, lambda rng, content: content])
    return Case("d.npz", change(rng, whole), lambda path: load(str(path), "all", SHAPE))


def record(rng: random.Random, canary: str) -> Case:
    whole = json.loads((Path(__file__).parents[2] / "zoo" / "badnets-3.json").read_text())
    content = rng.choice([
        lambda: rng.choice(m.ANY)(rng, json.dumps(whole).encode()),
        lambda: json.dumps(m.rewritten(rng, whole)).encode(),
        lambda: json.dumps(m.rewritten(rng, whole)).encode(),
        lambda: rng.choice([b"[", b'{"a":']) * rng.choice([10, 100_000]),
    ])()  # fmt: skip
    return Case("record.json", content, lambda path: report.render(records.read(path)))


def state(rng: random.Random, canary: str) -> Case:
    """The state of a run, with the checksum of its content in most cases: an attacker can count too."""
    rounds = {"round": 2, "parts": {"student": weights()}, "random": {"cpu": torch.get_rng_state()}}
    curve = [{"iteration": 1, "loss": 0.5}, {"iteration": 2, "loss": 0.4}]
    content = {"run_state": rounds, "curve": curve, "seconds": 1.0, "halvings": 0}
    if rng.random() < 0.3:
        content = m.rewritten(rng, content)
    payload = m.saved({"settings": "{}", **content} if isinstance(content, dict) else content)
    changed = rng.choice([
        lambda: rng.choice(m.ANY)(rng, payload),
        lambda: m.rezipped(rng, payload, pickled=lambda inside: m.by_hand(rng)),
        lambda: m.rezipped(rng, payload, pickled=lambda inside: m.opcodes(rng, inside)),
        lambda: payload,
    ])()  # fmt: skip
    return Case("state.pt", changed if rng.random() < 0.2 else state_file.signed(changed), _resumed)


def _resumed(path: Path) -> object:
    return course.fault(state_file.read(path), 4)
