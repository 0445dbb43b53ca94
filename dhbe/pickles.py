"""What a pickle of `torch.save` may hold: tensors, plain containers, and inert stand-ins for what training scripts add.

Pickles are disassembled before torch's restricted loader sees them: those that name anything else are refused, with these
names, and so are those whose objects would exhaust the process (see `opcodes`).
"""

import io
import pickletools
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import IO

import torch

from dhbe import opcodes
from dhbe.errors import Refused
from dhbe.matching import show, some

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool}
DTYPES |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".tar")
MEND = "ask for a .safetensors file, or for what torch.save(model.state_dict(), path) writes"


class Inert:
    """Replaces an object beside the weights, such as a training script's settings; accepts any arguments and state.

    Restoring the real objects would be unsafe: the state that a pickle sets on a numpy dtype changes it process-wide.
    """

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _NoItems:
    """Replaces a kind of dict by a plain one: the restricted loader fills no others."""

    def __new__(cls, *_: object) -> dict:  # type: ignore[misc]
        return {}


def _no_elements(*_: object) -> list:
    return []


_MULTIARRAY = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
_PATHS = [
    f"{module}.{pure}{system}Path"
    for module in ("pathlib", "pathlib._local")
    for pure in ("", "Pure")
    for system in ("Posix", "Windows")
]
_LOSSES = ("CrossEntropy", "NLL", "BCE", "BCEWithLogits", "MSE", "L1", "SmoothL1", "KLDiv")
_STAND_INS: dict[str, Callable] = dict.fromkeys([
    "numpy.ndarray", "numpy.dtype", *_MULTIARRAY, *_PATHS, "argparse.Namespace", "types.SimpleNamespace", "builtins.frozenset",
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"builtins.{name}" for name in ("int", "float", "str", "bool", "list", "dict", "tuple")),  # factories of defaultdict
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode", "typing.Any",
    "torch.torch_version.TorchVersion", *(f"torch.nn.modules.loss.{name}Loss" for name in _LOSSES),
    "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
], Inert) | dict.fromkeys(opcodes.DICTS, _NoItems) | {"collections.deque": _no_elements}  # fmt: skip
_TENSOR = re.compile(
    r"torch\.((cuda|storage)\.)?\w+Storage|torch\.(Size|device)|torch\._utils\._rebuild_(tensor(_v[23])?|parameter)"
)
_HARMLESS = {"collections.OrderedDict", "collections.Counter", "_codecs.encode"}  # the last spells bytes in protocol 2
_HARMLESS |= {*_STAND_INS, "builtins.set", *map(str, DTYPES)}


def check(file: Path, size: int) -> bool:
    """Checks a file of `torch.save` of any age before it goes to the restricted loader.

    Args:
        file: A regular file.
        size: Its size in bytes.

    Returns:
        Whether it is a zip file, whose tensors can be mapped.

    Raises:
        Refused: As for `check_zip`.
        Exception: It is broken.
    """
    with file.open("rb") as stream:
        if stream.read(4) == b"PK\x03\x04":
            check_zip(stream, size)
            return True
    with opcodes.Whole(file) as stream:
        _refuse_strangers(stream, pickles=5)  # the legacy format: five pickles in a row, then bytes
        stream.seek(0)
        opcodes.check(stream, 5, size)
    return False


def restricted() -> AbstractContextManager[None]:
    """Lets the restricted loader replace known harmless objects by their stand-ins inside."""
    return torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _STAND_INS.items()])


def check_zip(stream: IO[bytes], size: int) -> None:
    """Checks a zip file of `torch.save` before it goes to the restricted loader.

    Args:
        stream: The file.
        size: Its size in bytes.

    Raises:
        Refused: It asks for more than tensors and plain containers, or for too many; the message lacks its subject.
        Exception: It is broken.
    """
    with zipfile.ZipFile(stream) as archive:
        pickled = _pickle_of(archive, size)
    _refuse_strangers(io.BytesIO(pickled), pickles=1)
    stream.seek(0)
    if torch._C.PyTorchFileReader(stream).get_record("data.pkl") != pickled:
        raise Refused(f"is an ambiguous zip archive, which different programs read differently: {MEND}")
    opcodes.check(io.BytesIO(pickled), 1, size)


def _pickle_of(archive: zipfile.ZipFile, size: int) -> bytes:
    """The pickle inside a zip of ``torch.save``, whose members must be uncompressed."""
    members = archive.infolist()
    names = [member.filename.partition("/")[2].lower() for member in members]  # torch ignores case
    if "constants.pkl" in names:
        raise Refused(
            "is a TorchScript archive, which is a program: if you trust it, extract the weights with "
            "torch.save(torch.jit.load(path).state_dict(), 'model.pt')"
        )
    if inside := next((name for name in names if name.endswith(SUFFIXES)), None):
        raise Refused(f"is a zip archive that holds {show(inside)}: unpack it, and give the model inside")
    if names.count("data.pkl") != 1:
        raise Refused(f"is a zip archive, but not of torch.save (which has one data.pkl): {MEND}")
    unpacked = sum(member.file_size for member in members)
    if unpacked > size:
        raise Refused(f"has {size} bytes and would unpack to {unpacked}: refused as a zip bomb")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise Refused(f"is compressed, and so not written by torch.save: {MEND}")
    orders = {archive.read(member) for member, name in zip(members, names, strict=True) if name == "byteorder"}
    if orders - {sys.byteorder.encode()}:  # torch would swap bytes in the read-only mapped file, and crash
        raise Refused(f"has the byte order of another machine: {MEND}")
    return archive.read(members[names.index("data.pkl")])


def _refuse_strangers(stream: IO[bytes], pickles: int) -> None:
    """Refuses pickles that import more than plain tensors need."""
    strangers, broken = {}, None
    try:
        for name in _imports(stream, pickles):
            if name not in _HARMLESS and not _TENSOR.fullmatch(name):
                strangers[show(name)] = None  # a set in order
    except Exception as error:  # the names before may be enough to refuse it
        broken = error
    if any(name.startswith("torch.nn.modules.") for name in strangers):
        own_first = sorted(strangers, key=lambda name: name.startswith(("torch.", "__builtin__.")))
        raise Refused(f"is a whole pickled network, which is a program and was not run ({some(own_first)}): {MEND}")
    if strangers and all(name.startswith("torch.") for name in strangers):
        raise Refused(f"holds sparse, quantised or other special tensors ({some(strangers)}): save plain dense ones")
    if strangers:
        raise Refused(f"asks to import {some(strangers)}; nothing was run: {MEND}")
    if broken:
        raise broken


def _imports(stream: IO[bytes], pickles: int) -> Iterator[str]:
    """The names that consecutive pickles would import, from their opcodes; nothing is executed."""
    texts, memo = ["", ""], {}
    for _ in range(pickles):
        for opcode, argument, _ in islice(pickletools.genops(stream), opcodes.MOST_OPCODES):
            if opcode.name in ("GLOBAL", "INST"):
                yield re.sub("^__builtin__\\.", "builtins.", str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            elif opcode.name == "MEMOIZE" or opcode.name.endswith("PUT"):
                memo[len(memo) if argument is None else argument] = texts[-1]
            elif opcode.name.endswith("GET"):
                texts.append(memo.get(argument, ""))
            elif isinstance(argument, str):
                texts.append(argument)
