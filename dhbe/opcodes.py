"""Checks from its opcodes what a pickle would build, before anything is built.

Torch's restricted loader runs no code from a file, but builds whatever containers the file describes. A few hundred bytes
can describe a tuple nested so deeply that hashing it overflows the stack, or one that doubles over thirty levels, which no
machine can compare or print. So the opcodes are interpreted once with summaries instead of objects: the nesting depth of
each value, and its size with everything shared expanded. A separate process for every load, with limits on stack, memory and
time, would stop the same files, but would cost seconds for each harmless one, and a library should not start processes.
"""

import io
import os
import pickletools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dhbe.errors import Refused

DEEPEST = 100
"""Maximum nesting depth of containers; files of training scripts have about ten."""

MOST_OPCODES = 500_000
"""Maximum number of opcodes, interpreted in a few seconds; 2,000 tensors with Adam's state take about a fifth."""

MOST_TENSORS = 20_000
"""Maximum number of tensors, optimiser state included; the largest networks of timm have a tenth of it."""

MOST_KEYS = 10_000
"""Maximum number of dictionary keys other than texts and ordinary integers. Their hashes can be made to collide, so that
each key is compared with all before it."""

MOST_DIMENSIONS = 64
"""Maximum number of dimensions of a tensor, torch's own limit in many places."""

SHARED = 64 * 2**20
"""Bytes to which a pickle may expand beyond a small multiple of its own size."""

ITEM_SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "ComplexFloat": 8}
"""Bytes per element by the name of the storage; others count 1, which never overestimates."""

_ATOM = 8
"""Minimum number of bytes that a value counts."""

_CONSTRUCTORS = re.compile(r"torch\.(Size|device|_utils\._rebuild_\w+)")
_STORAGE = re.compile(r"torch\.(?:(?:cuda|storage)\.)?(\w+)Storage")
_LIGHTNING = ("lightning.fabric.utilities.data", "lightning_fabric.utilities.data", "lightning_lite.utilities.data",
              "lightning.pytorch.utilities.parsing", "pytorch_lightning.utilities.parsing")  # fmt: skip
DICTS = {"collections.defaultdict", *(f"{module}.AttributeDict" for module in _LIGHTNING)}
"""Kinds of dicts that become plain ones."""
_DICTS = {"collections.OrderedDict", "collections.Counter", *DICTS}
_INERT = re.compile(r"torch\.(nn\.modules\.loss\.\w+|torch_version\.TorchVersion)")
"""Objects of torch beside the weights, which are replaced by inert ones."""
_SET, _DEQUE = "builtins.set", "collections.deque"
_ATTRIBUTES = {"_metadata"}  # set by `torch.nn.Module.state_dict` on its result


@dataclass(slots=True, eq=False)
class _Value:
    """The summary of an object that the pickle would build."""

    kind: str
    """text, number, name (of a global), tuple, list, dict, made (by a call), storage, or plain."""
    content: object = None
    """The text, number or name itself; for a made object, the name of the function that was called."""
    depth: int = 0
    weight: int = _ATOM
    """Size in bytes with everything shared expanded."""
    width: int = 0
    """Number of direct items."""
    widest: int = 0
    """Width of the widest item."""
    items: "Sequence[_Value]" = ()
    """The items of a short tuple."""
    keys: set[object] | None = None
    """The text keys of a dict."""
    held: bool = False
    """Whether it is an item of another value, and so must not change any more."""


class _Machine:
    """Interprets opcodes like an unpickler, with summaries instead of objects."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.budget = 16 * size + SHARED
        self.opcodes = self.tensors = self.odd_keys = 0
        self.storages: dict[object, int] = {}
        self.claimed = 0

    def run(self, stream: IO[bytes]) -> None:
        """Interprets one pickle, from its first opcode to its STOP."""
        self.stack: list[_Value] = []
        self.marks: list[list[_Value]] = []
        self.memo: dict[int, _Value] = {}
        for opcode, argument, _ in pickletools.genops(stream):
            self.opcodes += 1
            if self.opcodes > MOST_OPCODES:
                raise _bomb(f"a pickle of more than {MOST_OPCODES:,} steps")
            self._step(opcode.name, argument)

    def _step(self, name: str, argument: object) -> None:
        if step := _STEPS.get(name):
            step(self)
        elif name.endswith("PUT"):
            assert isinstance(argument, int)
            self.memo[argument] = self.stack[-1]
        elif name.endswith("GET"):
            assert isinstance(argument, int)
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(_Value("name", str(argument).replace(" ", ".")))
        elif isinstance(argument, str | bytes):
            self.stack.append(_Value("text", argument, weight=_ATOM + len(argument)))
        elif name in _NUMBERS:
            self.stack.append(_Value("number", argument))
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"opcode {name} does not occur in files of torch.save")

    def put(self, holder: _Value, *items: _Value) -> None:
        """Adds items to a container and updates its summary."""
        if holder.held:
            raise _bomb("a container that changes after it was put into another")
        for item in items:
            if item is holder:
                raise _bomb("a container that holds itself")
            item.held = True
            holder.depth = max(holder.depth, item.depth + 1)
            holder.weight += item.weight
            holder.widest = max(holder.widest, item.width)
            self.budget -= item.weight
        holder.width += len(items)
        if holder.depth > DEEPEST:
            raise _bomb(f"containers nested more than {DEEPEST} deep")
        if self.budget < 0:
            raise _bomb(f"far more than its {self.size:,} bytes, with everything shared expanded")

    def pop_mark(self) -> list[_Value]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def tuple_of(self, items: list[_Value]) -> None:
        made = _Value("tuple", items=items if len(items) <= 8 else ())
        self.put(made, *items)
        self.stack.append(made)

    def last(self, count: int) -> list[_Value]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def append(self, items: list[_Value]) -> None:
        target = self._top("list", "made")
        if target.kind == "made" and target.content != _DEQUE:
            raise ValueError(f"items for {target.content}")
        self.put(target, *items)

    def set_items(self, items: list[_Value]) -> None:
        target = self._top("dict", "made")
        if len(items) % 2 or (target.kind == "made" and target.content not in _DICTS):
            raise ValueError("keys without values")
        target.keys = target.keys or set()
        target.keys.update(key.content for key in items[::2] if key.kind == "text")
        for key in items[::2]:
            if key.kind != "text" and not (
                key.kind == "number" and isinstance(key.content, int) and abs(key.content) < 2**60
            ):
                self.odd_keys += 1
        self._count()
        self.put(target, *items)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function.kind != "name" or arguments.kind != "tuple":
            raise ValueError("a call of something that is not a function")
        name = str(function.content)
        if _STORAGE.fullmatch(name):
            raise _bomb("a storage without a file")
        if name == "_codecs.encode" and [item.content for item in arguments.items[1:]] != ["latin1"]:
            raise ValueError("bytes in an encoding that pickle does not use")
        if _CONSTRUCTORS.fullmatch(name):
            self.tensors += name.startswith("torch._utils.")
            if max(arguments.width, arguments.widest) > MOST_DIMENSIONS:
                raise _bomb(f"a tensor of more than {MOST_DIMENSIONS} dimensions")
        elif name in _DICTS or name == _SET:
            self.odd_keys += sum(item.width for item in arguments.items if item.kind != "dict")
        self._count()
        made = _Value("made", name)
        self.put(made, arguments)
        if name == _SET:
            made.width = sum(item.width for item in arguments.items)
        self.stack.append(made)

    def new(self) -> None:
        if _special(self.stack[-2].content):
            raise ValueError("a torch object that is not built by its function")
        self.call()

    def build(self) -> None:
        state, target = self.stack.pop(), self._top("made")
        plain = state.kind == "dict" and (state.keys or set()) <= _ATTRIBUTES
        if _special(target.content) or (target.content in _DICTS and not plain):
            raise ValueError(f"attributes for {target.content}")
        self.put(target, state)

    def persistent(self) -> None:
        """A reference to the bytes of a tensor elsewhere in the file, whose size cannot exceed that of the file."""
        place = self.stack.pop()
        kind, key, _, count = ([*place.items, *[_Value("plain")] * 5])[1:5]
        storage = _STORAGE.fullmatch(str(kind.content)) if kind.kind == "name" else None
        if not storage or key.kind != "text" or not isinstance(count.content, int):
            raise ValueError("a storage that is not described as torch.save would")
        size, known = count.content * ITEM_SIZES.get(storage[1], 1), self.storages.get(key.content, 0)
        self.storages[key.content] = max(size, known)
        self.claimed += max(size - known, 0)
        if self.claimed > self.size:
            raise Refused(f"has {self.size} bytes, but its tensors claim {self.claimed}: refused as a bomb")
        self.stack.append(_Value("storage"))

    def _count(self) -> None:
        if self.tensors > MOST_TENSORS:
            raise _bomb(f"more than {MOST_TENSORS:,} tensors")
        if self.odd_keys > MOST_KEYS:
            raise _bomb(f"more than {MOST_KEYS:,} keys that are neither texts nor ordinary integers")

    def _top(self, *kinds: str) -> _Value:
        if self.stack[-1].kind not in kinds:
            raise ValueError(f"a {self.stack[-1].kind} where a {kinds[0]} should be")
        return self.stack[-1]


def _pushes(kind: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(_Value(kind))


_STEPS: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "NONE": _pushes("plain"),
    "NEWTRUE": _pushes("plain"),
    "NEWFALSE": _pushes("plain"),
    "EMPTY_TUPLE": _pushes("tuple"),
    "EMPTY_LIST": _pushes("list"),
    "EMPTY_DICT": _pushes("dict"),
    "TUPLE": lambda machine: machine.tuple_of(machine.pop_mark()),
    "TUPLE1": lambda machine: machine.tuple_of(machine.last(1)),
    "TUPLE2": lambda machine: machine.tuple_of(machine.last(2)),
    "TUPLE3": lambda machine: machine.tuple_of(machine.last(3)),
    "APPEND": lambda machine: machine.append(machine.last(1)),
    "APPENDS": lambda machine: machine.append(machine.pop_mark()),
    "SETITEM": lambda machine: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine: machine.set_items(machine.pop_mark()),
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
"""The effect of each opcode that torch's restricted loader supports, except constants and the memo."""

_NUMBERS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"}


class Whole(io.BufferedReader):
    """A file whose reads are limited to its size: otherwise a buffer of the claimed size would be allocated first."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("rb", buffering=0))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None else min(size, self._size))


def check(stream: IO[bytes], pickles: int, size: int) -> None:
    """Refuses pickles whose objects would be too deep, too many or too large, or that `torch.save` did not write.

    Args:
        stream: The file, positioned at the first pickle.
        pickles: Number of consecutive pickles.
        size: Size of the whole file in bytes.

    Raises:
        Refused: They would exhaust the process.
        ValueError, LookupError: Torch's restricted loader would not read them.
    """
    machine = _Machine(size)
    for _ in range(pickles):
        machine.run(stream)


def _special(name: object) -> bool:
    return str(name).startswith("torch.") and not _INERT.fullmatch(str(name))


def _bomb(what: str) -> Refused:
    return Refused(f"would expand to {what}: refused as a bomb")
