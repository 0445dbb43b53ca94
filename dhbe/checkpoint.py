"""Reads plain tensors from untrusted checkpoints without executing anything in them.

A checkpoint of a suspect model is considered hostile. Safetensors files hold no code. Pickles are checked first (`pickles`),
then read by torch's restricted loader twice: once without data, to compare the claimed sizes with the size of the file, and
then for real. There is no way to bypass that loader, and TorchScript is not supported.
"""

import math
import re
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dhbe import candidates, containers, files, foreign, matching, opcodes, pickles
from dhbe.containers import Container, TorchFile
from dhbe.errors import Failed, Refused, out_of_memory, said
from dhbe.matching import show, some
from dhbe.networks.external import guarded
from dhbe.pickles import DTYPES, MEND

WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")  # DataParallel, torch.compile, Lightning and the like
LARGEST_HEADER = 8 * 2**20  # bytes of a safetensors header; 20,000 tensors take two MiB
SLACK = (
    3  # claimed size / file size above which a file is a bomb; tied weights are stored once but counted at each name
)
SIGNS = {
    "a Git LFS pointer, not the model: fetch the model with `git lfs pull`": re.compile(rb"version https://git-lfs"),
    "a web page, not the model: download it again, perhaps in a browser, as some sites ask for confirmation":
        re.compile(rb"\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE),
    "a packed archive: unpack it, and give the model inside":
        re.compile(rb"\x1f\x8b|BZh\d|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|.{257}ustar", re.DOTALL),
    "an HDF5 file, perhaps of Keras: export it with tf2onnx, or copy its weights into a torch network":
        re.compile(rb"\x89HDF"),
}  # fmt: skip
"""What files that are no models begin with."""


@dataclass(frozen=True, eq=False)
class State:
    """The weights of a checkpoint.

    Attributes:
        tensors: Dense, finite CPU tensors with the keys, order and dtypes of the file.
        prefix: The prefix that wrappers (DataParallel, torch.compile, ...) add to every key, or "".
        where: The path of keys that leads to the state dict in the file, or "" if it is the whole content.
        sha256: SHA-256 of the file, 64 hexadecimal digits.
        notes: Notes on how the weights were chosen and matched, one line each.
        names: The network's name of each tensor that it needs, by key; None if there is no network yet, or if the names are
            the same.
        container: Writes new weights in the original file format; None if that is a single .safetensors file.
    """

    tensors: dict[str, Tensor]
    prefix: str
    where: str
    sha256: str
    notes: tuple[str, ...] = ()
    names: Mapping[str, str] | None = None
    container: Container | None = None

    @property
    def plain(self) -> dict[str, Tensor]:
        """The tensors under keys without the additions of wrappers; keys without the common prefix are left out."""
        kept = {key.removeprefix(self.prefix): x for key, x in self.tensors.items() if key.startswith(self.prefix)}
        bare = {matching.common(key): x for key, x in kept.items()}
        return bare if len(bare) == len(kept) else kept


def read(path: Path, weights: str | None = None) -> State:
    """Reads the weights in a .safetensors file or one written by ``torch.save``, without executing anything in it.

    A symbolic link to a regular file is followed, as caches of downloaded models consist of such links.

    Args:
        path: The file.
        weights: Which of several state dicts, or the prefix of its tensors' names; see `candidates.choose`.

    Raises:
        Refused: The file is not readable; its content is broken, truncated or a bomb; a pickle names a class or function
            that is not allowed; or the state dict holds anything but dense, finite tensors.
        Failed: There is not enough memory.
    """
    try:
        file = path.resolve(strict=True)
        status = file.stat()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        raise Refused(f"cannot read {foreign.name(path)}: {getattr(error, 'strerror', None) or error}") from error
    name = f"{foreign.name(path)} (a link to {foreign.name(file)})" if path.is_symlink() else foreign.name(path)
    if not stat.S_ISREG(status.st_mode):
        raise Refused(
            f"{name} is {'a folder' if file.is_dir() else 'not a regular file'}: name the checkpoint file itself"
        )
    files.opened(file).close()  # refuses sparse files, which would take minutes to read
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            choice, outer = _load(file, status.st_size, weights)
            tensors = _own(choice.chosen.tensors)
    except Refused as refusal:
        raise Refused(f"{name} {said(refusal)}") from refusal.__cause__
    except Exception as error:  # parsers of hostile bytes may raise anything
        if out_of_memory(error):
            raise Failed(f"not enough memory to read {name}") from error
        # Only the first sentence: the rest of torch's message advises disabling the protection.
        reason = re.split(r"\n|\. ", str(error).rpartition("WeightsUnpickler error: ")[2].strip())[0]
        raise Refused(
            f"{name} is broken, truncated or not a checkpoint ({type(error).__name__}: {show(reason)}): {MEND}"
        ) from error
    notes = (choice.note,) if choice.note else ()
    where, container = show(choice.chosen.where), _container(path, choice, outer) if outer else None
    prefix, digest = matching.majority_prefix(tensors, WRAPPERS), files.sha256(file)
    return State(tensors, prefix, where, digest, notes, container=container)


def load_into(network: nn.Module, state: State, weights: str | None = None) -> State:
    """Loads the weights of `state` into `network`, in float32, matching names by `matching`.

    Args:
        network: The network, untrained; changed in place.
        state: What `read` returned.
        weights: Which of several networks in the state dict; ignored if `read` has already chosen by it.

    Returns:
        The state, with the network's names added.

    Raises:
        Refused: Tensors are missing, left over or of the wrong shape, or the vendor's code raises. Tensors that do not
            affect the output may be missing or left over.
    """
    if weights in (state.where, state.where.rpartition(".")[2]):
        weights = None
    matched = state.container.match if state.container else matching.match
    found = matched(network, state.tensors, weights)
    shapes = {key: value.shape for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    given = {
        name: tensor.reshape(shapes[name]) if tensor.numel() == 1 else tensor
        for name, tensor in ((name, state.tensors[key]) for key, name in found.names.items())
        if tensor.numel() == 1 or tensor.shape == shapes[name]
    }
    with guarded("loading the weights into the network"):  # a vendor's class may override it
        network.float().load_state_dict(given, strict=False)
    return replace(state, names=found.names, notes=(*state.notes, *found.notes))


def save(path: Path, network_state: Mapping[str, Tensor], like: State, metadata: Mapping[str, str]) -> None:
    """Writes `network_state` as a safetensors file with exactly the keys, shapes and dtypes of `like`.

    Args:
        path: The file, which is written atomically.
        network_state: The ``state_dict()`` of a network into which `like` was loaded.
        like: The checkpoint that the network came from.
        metadata: Text for the header of the file.

    Raises:
        Failed: A weight is not finite in the dtype of `like`, or the file cannot be written.
    """
    tensors = changed(network_state, like)
    files.write(path, safetensors.torch.save(tensors, dict(metadata)))


def _container(path: Path, choice: candidates.Choice, outer: dict) -> TorchFile:
    """The content of a `torch.save` file around its weights."""
    mould, twins = containers.mould(outer, choice)
    suffix = path.suffix if re.fullmatch(r"\.\w{1,8}", path.suffix) and path.suffix != ".safetensors" else ".pt"
    kept = tuple(_own(twin.tensors) for twin in twins)
    return TorchFile(f"clean{suffix}", mould, kept, _twin)


def _twin(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A twin with the network's values; empty if its tensors cannot be matched."""
    try:
        names = matching.match(network, tensors).names
    except Refused:
        return {}
    return changed(network.state_dict(), State(dict(tensors), "", "", "", names=names))


def changed(network_state: Mapping[str, Tensor], like: State) -> dict[str, Tensor]:
    """The tensors of `like` with the network's values, in its keys, shapes and dtypes; tensors of no network are kept.

    Raises:
        Failed: A value is not finite in the dtype of `like`.
    """
    tensors = {}
    for key, old in like.tensors.items():
        name = key if like.names is None else like.names.get(key)
        new = old if name is None else network_state[name].detach().to("cpu", old.dtype).reshape(old.shape)
        if not new.isfinite().all():
            raise Failed(f"{key} is not finite in {old.dtype}: nothing was written")
        tensors[key] = new.clone(memory_format=torch.contiguous_format)  # a copy: safetensors refuses shared memory
    return tensors


def _load(file: Path, size: int, weights: str | None) -> tuple[candidates.Choice, dict | None]:
    """The chosen state dict and, for a file of `torch.save`, its whole content."""
    with file.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise Refused(f"is empty: {MEND}")
    header = int.from_bytes(head[:8], "little")
    safe = file.suffix == ".safetensors" or (head[8:9] == b"{" and header < size)
    if head[8:9] != b"{" and (form := next((form for form, sign in SIGNS.items() if sign.match(head)), None)):
        raise Refused(f"is {form}")
    if safe:
        if LARGEST_HEADER < header < size:
            raise Refused(
                f"has a header of {header:,} bytes, over the limit of {LARGEST_HEADER:,}: no model needs that much"
            )
        return _find(safetensors.torch.load_file(file), weights), None
    zipped = pickles.check(file, size)
    with pickles.restricted():
        with torch.serialization.skip_data():  # a dry run without data, to check the claimed sizes
            outer = torch.load(str(file), map_location="meta", weights_only=True)
        _find(outer, weights)
        total = sum(math.prod(tensor.shape) * tensor.itemsize for tensor in containers.tensors(outer))
        if total > SLACK * size:
            raise Refused(f"has {size} bytes, but its tensors claim {total}: refused as a bomb")
        outer = torch.load(str(file), map_location="cpu", weights_only=True, mmap=zipped)
        return _find(outer, weights), outer


def _find(outer: Any, weights: str | None) -> candidates.Choice:
    """The state dict in the content of a file."""
    if not isinstance(outer, dict):
        raise Refused(f"holds a {type(outer).__name__} instead of a state dict: {MEND}")
    found = candidates.candidates(outer)
    if not found:
        raise Refused(f"holds no tensors in a state dict (keys: {some(map(show, outer)) or 'none'}): {MEND}")
    inside = len(found) == 1 and weights is not None and any(f".{weights}." in f".{key}" for key in found[0].tensors)
    choice = candidates.choose(found, None if inside else weights)
    beside = containers.plain(choice.chosen.tensors)
    others = [
        f"{show(key)} ({value.dtype if isinstance(value, Tensor) else type(value).__name__})"
        for key, value in choice.chosen.tensors.items()
        if not (isinstance(key, str) and (key in beside or (isinstance(value, Tensor) and value.dtype in DTYPES)))
    ]
    if others:
        raise Refused(f"has a state dict with entries that are not plain tensors: {some(others)}: {MEND}")
    tensors = [value for value in choice.chosen.tensors.values() if isinstance(value, Tensor)]
    if len(tensors) > opcodes.MOST_TENSORS or any(tensor.ndim > opcodes.MOST_DIMENSIONS for tensor in tensors):
        raise Refused(
            f"has more than {opcodes.MOST_TENSORS:,} tensors, or one with more than {opcodes.MOST_DIMENSIONS} dimensions: "
            "no model needs that"
        )
    if nameless := candidates.unnamed(outer, choice.chosen):
        told = (
            f"weights without names ({some(map(show, nameless))}) are neither read nor written; they may be an average"
        )
        notes = "; ".join(filter(None, (choice.note, told)))
        choice = replace(choice, note=notes, unnamed=tuple(nameless.values()))
    return choice


def _own(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of the tensors of a state dict."""
    return {key: _plain(key, value) for key, value in state.items() if isinstance(value, Tensor)}


def _plain(key: str, tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor that may be a view of the mapped file, or a parameter."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise Refused(f"has NaN or infinite weights in {show(key)}: the model cannot work, download it again")
    return tensor.detach().clone(memory_format=torch.contiguous_format)
