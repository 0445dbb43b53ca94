"""Checkpoints from strangers: plain tensors come out, and nothing that a file asks for is ever run.

A checkpoint of a suspect model is hostile until shown otherwise. Safetensors files hold no code. Pickles are first
disassembled: one that names anything beside tensors, numpy numbers and plain containers is refused and the names are
told, and so is one whose objects would exhaust the process (see `opcodes`). The rest goes through torch's restricted
loader twice: once without data, to compare the sizes that the file claims with the size that it has, then in earnest.
There is no way round that loader, and no TorchScript.
"""

import io
import math
import pickletools
import re
import stat
import sys
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from torch import Tensor, nn

from dhbe import files, foreign, opcodes
from dhbe.errors import Failed, Refused, out_of_memory
from dhbe.networks.external import guarded

PLACES = ("state_dict", "model", "net", "model_state_dict")  # where training scripts put the state dict
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")  # DataParallel, torch.compile, Lightning and the like
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool}
DTYPES |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
LARGEST_HEADER = 8 * 2**20  # of a safetensors file, bytes; 20,000 tensors take two
SLACK = 3  # tied weights are stored once and counted at each name; more than so many times the file is a bomb
COUNTER = "num_batches_tracked"  # of BatchNorm; it has no part in what a network computes
MEND = "ask for a .safetensors file, or for what torch.save(model.state_dict(), path) writes"


class NumpyValue:
    """Stands for a number or array of numpy beside the weights, as the best accuracy: made of anything, keeps nothing.

    The real ones must not be restored: the state that a pickle gives to a dtype changes it for the whole process.
    """

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_MULTIARRAY = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
_NUMPY = ["numpy.ndarray", "numpy.dtype", *_MULTIARRAY]
_TENSOR = re.compile(
    r"torch\.((cuda|storage)\.)?\w+Storage|torch\.(Size|device)|torch\._utils\._rebuild_(tensor(_v[23])?|parameter)"
)
_HARMLESS = {"collections.OrderedDict", "collections.Counter", "_codecs.encode"}  # the last spells bytes in protocol 2
_HARMLESS |= {*_NUMPY, *map(str, DTYPES)}


@dataclass(frozen=True, eq=False)
class State:
    """The weights of a checkpoint, as found.

    Attributes:
        tensors: Dense CPU tensors under the very keys, in the order and with the dtypes of the file; all finite.
        prefix: What wrappers (DataParallel, torch.compile, ...) put before every key, or "".
        where: The key under which the file keeps the state dict, or "" if it is bare.
        sha256: Of the file, 64 hexadecimal digits.
    """

    tensors: dict[str, Tensor]
    prefix: str
    where: str
    sha256: str

    @property
    def plain(self) -> dict[str, Tensor]:
        """The tensors under keys without the prefix."""
        return {key.removeprefix(self.prefix): tensor for key, tensor in self.tensors.items()}


def read(path: Path) -> State:
    """Reads the weights in a .safetensors file or in one written by ``torch.save``, without running anything in it.

    A link to a regular file is followed, because caches of downloaded models consist of them.

    Raises:
        Refused: No readable file; broken, truncated or bomb-like content; a pickle that names any other class or
            function; anything but dense, finite tensors where the state dict should be.
    """
    try:
        file = path.resolve(strict=True)
        status = file.stat()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        raise Refused(f"cannot read {foreign.name(path)}: {getattr(error, 'strerror', None) or error}") from error
    name = f"{foreign.name(path)} (a link to {foreign.name(file)})" if path.is_symlink() else foreign.name(path)
    if not stat.S_ISREG(status.st_mode):
        raise Refused(
            f"{name} is {'a folder' if file.is_dir() else 'no regular file'}: name the checkpoint file itself"
        )
    files.opened(file).close()  # a file that consists of holes is gone through for minutes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            where, found = _load(file, status.st_size)
            tensors = {key: _plain(key, tensor) for key, tensor in found.items()}
    except Refused as refusal:
        raise Refused(f"{name} {refusal}") from refusal.__cause__
    except Exception as error:  # whatever a parser thinks of hostile bytes, the answer is the same
        if out_of_memory(error):
            raise Failed(f"the memory does not suffice to read {name}") from error
        # The first sentence of the reason; what follows in torch's text advises to switch the protection off.
        reason = re.split(r"\n|\. ", str(error).rpartition("WeightsUnpickler error: ")[2].strip())[0]
        raise Refused(
            f"{name} is broken, truncated or no checkpoint ({type(error).__name__}: {_show(reason)}): {MEND}"
        ) from error
    return State(tensors, _prefix(tensors), where, files.sha256(file))


def load_into(network: nn.Module, state: State) -> None:
    """Gives `network` the weights of `state`, in float32; names match with or without the wrappers' prefix.

    Raises:
        Refused: Tensors are missing, left over or of another shape, or code of the vendor's class raises. BatchNorm's
            batch counters may be missing.
    """
    wanted = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    cut = _cut(state, wanted)
    given = {key.removeprefix(cut): tensor for key, tensor in state.tensors.items()}
    faults = {
        "missing": [key for key in wanted if key not in given and not key.endswith(COUNTER)],
        "unexpected": [key for key in given if key not in wanted],
        "wrong shape": [key for key in given if key in wanted and given[key].shape != wanted[key].shape],
    }

    def told(key: str) -> str:
        return f"{_show(key)} " + " for ".join(str(list(side[key].shape)) for side in (given, wanted) if key in side)

    if any(faults.values()):
        listed = "; ".join(f"{fault}: {_some(map(told, keys))}" for fault, keys in faults.items() if keys)
        raise Refused(f"the checkpoint does not fit the network ({listed}): check --arch and --classes")
    with guarded("loading the weights into the network"):  # a vendor's class may have its own way
        network.float().load_state_dict(given, strict=False)


def save(path: Path, network_state: Mapping[str, Tensor], like: State, metadata: Mapping[str, str]) -> None:
    """Writes `network_state` as a safetensors file with exactly the keys, shapes and dtypes of `like`.

    Args:
        path: The file; it is there whole or not at all.
        network_state: The ``state_dict()`` of a network into which `like` was loaded.
        like: The checkpoint that the network came from.
        metadata: Text for the header of the file.

    Raises:
        Failed: A weight is not finite in the dtype of `like`, or the file cannot be written.
    """
    cut, tensors = _cut(like, network_state), {}
    for key, old in like.tensors.items():
        new = network_state[key.removeprefix(cut)].detach().to("cpu", old.dtype)
        if not new.isfinite().all():
            raise Failed(f"{key} is not finite in {old.dtype}: {path} is not written")
        tensors[key] = new.clone(memory_format=torch.contiguous_format)  # a copy: safetensors refuses shared memory
    files.write(path, safetensors.torch.save(tensors, dict(metadata)))


def _load(file: Path, size: int) -> tuple[str, Mapping[str, Tensor]]:
    with file.open("rb") as stream:
        head = stream.read(64)
    if not head:
        raise Refused(f"is empty: {MEND}")
    if head.startswith(b"version https://git-lfs"):
        raise Refused("is a Git LFS pointer, not the model: fetch the model with `git lfs pull`")
    header = int.from_bytes(head[:8], "little")
    if file.suffix == ".safetensors" or (head[8:9] == b"{" and header < size):
        if LARGEST_HEADER < header < size:
            raise Refused(
                f"has a header of {header:,} bytes, over the limit of {LARGEST_HEADER:,}: no model needs that"
            )
        return _find(safetensors.torch.load_file(file))
    if zipped := head.startswith(b"PK\x03\x04"):
        with file.open("rb") as stream:
            check_zip(stream, size)
    else:
        with opcodes.Whole(file) as stream:
            _refuse_strangers(stream, pickles=5)  # the format before zips: five in a row, then bytes
            stream.seek(0)
            opcodes.check(stream, 5, size)
    with torch.serialization.safe_globals([(NumpyValue, name) for name in _NUMPY]):
        with torch.serialization.skip_data():  # a rehearsal without memory: sizes are believed only after it
            _, claimed = _find(torch.load(str(file), map_location="meta", weights_only=True))
        total = sum(math.prod(tensor.shape) * tensor.itemsize for tensor in claimed.values())
        if total > SLACK * size:
            raise Refused(f"has {size} bytes, but its tensors claim {total}: it is refused as a bomb")
        return _find(torch.load(str(file), map_location="cpu", weights_only=True, mmap=zipped))


def check_zip(stream: IO[bytes], size: int) -> None:
    """Judges what `torch.save` wrote as a zip, before it goes to the restricted loader.

    Args:
        stream: The file.
        size: Its bytes.

    Raises:
        Refused: It asks for more than tensors and plain containers, or for too much of them; "is ..." without a subject.
        Exception: It is broken, in whatever way.
    """
    with zipfile.ZipFile(stream) as archive:
        pickled = _pickle_of(archive, size)
    _refuse_strangers(io.BytesIO(pickled), pickles=1)
    stream.seek(0)
    if torch._C.PyTorchFileReader(stream).get_record("data.pkl") != pickled:
        raise Refused(f"is a zip archive that two programs read in two ways: {MEND}")
    opcodes.check(io.BytesIO(pickled), 1, size)


def _pickle_of(archive: zipfile.ZipFile, size: int) -> bytes:
    """The pickle inside what ``torch.save`` wrote: a zip whose members are stored as they are."""
    members = archive.infolist()
    names = [member.filename.partition("/")[2].lower() for member in members]  # torch does not mind the case
    if "constants.pkl" in names:
        raise Refused(f"is a TorchScript archive, which is a program: {MEND}")
    if names.count("data.pkl") != 1:
        raise Refused(f"is a zip archive, but not of torch.save (it needs one data.pkl): {MEND}")
    unpacked = sum(member.file_size for member in members)
    if unpacked > size:
        raise Refused(f"has {size} bytes and would unpack to {unpacked}: it is refused as a zip bomb")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise Refused(f"was packed by another program than torch.save, whose files are not compressed: {MEND}")
    orders = {archive.read(member) for member, name in zip(members, names, strict=True) if name == "byteorder"}
    if orders - {sys.byteorder.encode()}:  # torch would swap bytes in the mapped file, and crash
        raise Refused(f"has the byte order of another machine: {MEND}")
    return archive.read(members[names.index("data.pkl")])


def _refuse_strangers(stream: IO[bytes], pickles: int) -> None:
    """Refuses pickles that name more than plain tensors need."""
    strangers, broken = {}, None
    try:
        for name in _imports(stream, pickles):
            if name not in _HARMLESS and not _TENSOR.fullmatch(name):
                strangers[_show(name)] = None  # a set in order
    except Exception as error:  # it may have asked for enough before
        broken = error
    if any(name.startswith("torch.nn.modules.") for name in strangers):
        own_first = sorted(strangers, key=lambda name: name.startswith(("torch.", "__builtin__.")))
        raise Refused(f"is a whole pickled network, which is a program, and was not run ({_some(own_first)}): {MEND}")
    if strangers and all(name.startswith("torch.") for name in strangers):
        raise Refused(f"holds sparse, quantised or other special tensors ({_some(strangers)}): save plain dense ones")
    if strangers:
        raise Refused(f"asks to import {_some(strangers)}; nothing was run: {MEND}")
    if broken:
        raise broken


def _imports(stream: IO[bytes], pickles: int) -> Iterator[str]:
    """The names that pickles in a row would import, read off their opcodes; nothing is executed."""
    texts, memo = ["", ""], {}
    for _ in range(pickles):
        for opcode, argument, _ in islice(pickletools.genops(stream), opcodes.MOST_OPCODES):
            if opcode.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            elif opcode.name == "MEMOIZE" or opcode.name.endswith("PUT"):
                memo[len(memo) if argument is None else argument] = texts[-1]
            elif opcode.name.endswith("GET"):
                texts.append(memo.get(argument, ""))
            elif isinstance(argument, str):
                texts.append(argument)


def _find(outer: object) -> tuple[str, Mapping[str, Tensor]]:
    """The state dict in what a file holds, and the key under which it was: one of `PLACES`, or the only candidate."""
    if not isinstance(outer, dict):
        raise Refused(f"holds a {type(outer).__name__} instead of a state dict: {MEND}")
    places = [place for place in PLACES if isinstance(outer.get(place), dict)] or [
        place
        for place, inner in outer.items()
        if isinstance(inner, dict) and inner and all(isinstance(value, Tensor) for value in inner.values())
    ]
    if len(places) > 1 and places[0] not in PLACES:
        raise Refused(f"holds several state dicts ({_some(map(_show, places))}): save the one you mean")
    inner = outer[places[0]] if places else outer
    if not any(isinstance(value, Tensor) for value in inner.values()):
        raise Refused(f"holds no tensors in a state dict (keys: {_some(map(_show, outer)) or 'none'}): {MEND}")
    others = [
        f"{_show(key)} ({value.dtype if isinstance(value, Tensor) else type(value).__name__})"
        for key, value in inner.items()
        if not (isinstance(key, str) and isinstance(value, Tensor) and value.dtype in DTYPES)
    ]
    if others:
        raise Refused(f"has a state dict with entries that are no plain tensors: {_some(others)}: {MEND}")
    if len(inner) > opcodes.MOST_TENSORS or any(value.ndim > opcodes.MOST_DIMENSIONS for value in inner.values()):
        raise Refused(
            f"has more than {opcodes.MOST_TENSORS:,} tensors, or one of more than {opcodes.MOST_DIMENSIONS} dimensions: "
            "no model needs that"
        )
    return _show(places[0]) if places else "", inner


def _plain(key: str, tensor: Tensor) -> Tensor:
    """A copy in memory of its own, of a tensor that may be a view of the mapped file, or a parameter."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise Refused(f"has NaN or infinite weights in {_show(key)}: the model cannot work, fetch it again")
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _prefix(keys: Collection[str]) -> str:
    """The wrappers' names that begin every key."""
    prefix = ""
    while step := next((name for name in WRAPPERS if all(key.startswith(prefix + name) for key in keys)), None):
        prefix += step
    return prefix


def _cut(state: State, wanted: Collection[str]) -> str:
    """As much of the prefix as must go for the keys to fit `wanted`: a vendor's class may own a ``self.model``."""
    parts = state.prefix.split(".")
    cuts = [".".join([*parts[:count], ""]) for count in range(len(parts) - 1, 0, -1)] + [""]
    return max(cuts, key=lambda cut: sum(key.removeprefix(cut) in wanted for key in state.tensors))


def _show(text: object) -> str:
    """A name out of a hostile file, safe to print."""
    return foreign.name(text, longest=100) if isinstance(text, str) else f"<{type(text).__name__}>"


def _some(names: Iterable[str], most: int = 6) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
