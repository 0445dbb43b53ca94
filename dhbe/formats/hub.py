"""Folders of model hubs: config.json beside model.safetensors, of transformers or timm.

Only files with known names are opened, in the folder itself. A configuration consists of numbers and words: it selects one of
an installed library's networks, and can name neither code nor files. The network is first built without memory, to compare
its size with that of the weights.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dhbe import checkpoint, foreign, networks
from dhbe.checkpoint import State
from dhbe.containers import Container
from dhbe.data import Shape
from dhbe.errors import Refused
from dhbe.matching import show
from dhbe.networks.external import guarded, import_extra, import_torchvision

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Maps each tensor to its shard."""
PATTERNS = (
    r"model\.safetensors",
    r"model-\d+-of-\d+\.safetensors",
    r"pytorch_model\.bin",
    r"pytorch_model-\d+-of-\d+\.bin",
)
"""Names of files with weights, in order of preference."""

LARGEST = 16 * 2**20
"""Maximum size of a configuration in bytes."""

DEEPEST, WIDEST = 1000, 2**20
"""Maximum number of layers, and maximum value of other numbers, in a configuration."""

LOST = (
    "auto_map",
    "quantization_config",
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "architectures",
    "transformers_version",
)
"""Keys of transformers' configurations that do not concern the network itself."""


@dataclass(frozen=True, eq=False)
class Described:
    """A folder's description of its network."""

    arch: str
    """Name of the architecture for the record."""
    build: Callable[[int, Shape, int], nn.Module]
    """Builds an untrained network from the number of classes, the image shape and the maximum number of parameters."""
    classes: int | None
    names: tuple[str, ...]
    """Names of the classes in order."""
    shape: Shape
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    source: str
    """Name of the file with this description."""


@dataclass(frozen=True)
class Folder(Container):
    """Writes weights and configuration for the library that wrote the folder."""

    copies: Mapping[str, bytes]
    shards: Mapping[str, Sequence[str]]
    """Names of the tensors in each file of weights."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files, and of those that an earlier run may have left and that libraries would read first."""
        return tuple(dict.fromkeys((*self.shards, WEIGHTS, INDEX, *self.copies)))

    def content(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        """Content of the files by name."""
        made = {
            file: safetensors.torch.save({key: tensors[key] for key in keys}, {"format": "pt"})
            for file, keys in self.shards.items()
        }
        if len(made) > 1:
            size = sum(tensor.nbytes for tensor in tensors.values())
            places = {key: file for file, keys in self.shards.items() for key in keys}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            made[INDEX] = json.dumps(index, indent=2).encode()
        return {**made, **self.copies}


def read(folder: Path, weights: str | None = None) -> State:
    """Reads the weights in a folder, from all shards.

    Raises:
        Refused: There are none, or a file cannot be read.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise Refused(f"cannot read the folder {folder}: {(error.strerror or 'unreadable').lower()}") from error
    groups = ([name for name in names if re.fullmatch(pattern, name)] for pattern in PATTERNS)
    shards = next((group for group in groups if group), [])
    if not shards:
        others = [name for name in names if name.endswith((".h5", ".msgpack", ".onnx", ".keras", ".pb"))]
        mend = f"{others[0]} is of another library" if others else "or a folder with config.json and model.safetensors"
        raise Refused(f"{folder} is a folder: name the checkpoint file itself; {mend}")
    states = [checkpoint.read(folder / name, weights) for name in shards]
    tensors = {key: tensor for state in states for key, tensor in state.tensors.items()}
    if len(tensors) < sum(len(state.tensors) for state in states):
        raise Refused(f"the shards in {folder} hold tensors twice: download them again")
    of = re.fullmatch(r".*-of-(\d+)\..*", shards[0])
    if of and int(of[1]) != len(shards):
        raise Refused(f"{folder} holds {len(shards)} of {int(of[1])} shards: download the others too")
    digest = hashlib.sha256("".join(state.sha256 for state in states).encode()).hexdigest()
    copies = {name: (folder / name).read_bytes() for name in (CONFIG, PROCESSOR) if _json(folder / name) is not None}
    sole = states[0].sha256 if len(states) == 1 else digest
    files = [re.sub(r"^pytorch_model(.*)\.bin$", r"model\1.safetensors", name) for name in shards]
    split = {file: tuple(state.tensors) for file, state in zip(files, states, strict=True)}
    return replace(states[0], tensors=tensors, sha256=sole, container=Folder(copies, split))


def described(path: Path) -> Described | None:
    """Reads the configuration in a folder, or beside a file; None if there is none of a known library.

    Raises:
        Refused: It contains what is not allowed, or the library is missing.
    """
    folder = path if path.is_dir() else path.parent
    config = _json(folder / CONFIG)
    if config is None:
        return None
    if isinstance(config.get("architecture"), str):
        return _of_timm(config)
    if isinstance(config.get("model_type"), str):
        return _of_transformers(config, _json(folder / PROCESSOR) or {})
    return None


def _of_timm(config: dict[str, Any]) -> Described:
    fed = config.get("pretrained_cfg") if isinstance(config.get("pretrained_cfg"), dict) else config
    assert isinstance(fed, dict)
    name, more = config["architecture"], config.get("model_args") or {}
    if not isinstance(more, dict) or not all(_plain(value) for value in more.values()):
        raise Refused(
            f"{CONFIG}: model_args must be numbers: build the network yourself, and give --arch=file.py:function"
        )

    told = {key: value for key, value in more.items() if key not in ("num_classes", "in_chans", "img_size")}

    def build(classes: int, shape: Shape, most: int) -> nn.Module:
        return _within(most, lambda: networks.from_timm(name, classes, shape, told))

    shape, mean, std = _sides(fed.get("input_size")), _numbers(fed.get("mean")), _numbers(fed.get("std"))
    names = fed.get("label_names") or config.get("label_names")
    classes = config.get("num_classes") or fed.get("num_classes")
    return Described(
        f"timm:{name}", build, classes if isinstance(classes, int) else None, _texts(names), shape or (3, 224, 224),
        mean, std, f"{CONFIG}",
    )  # fmt: skip


def _of_transformers(config: dict[str, Any], processor: dict[str, Any]) -> Described:
    kind = config["model_type"]
    if config.get("quantization_config"):
        raise Refused(f"{CONFIG}: the weights are quantised; ask for those before quantisation")
    _check(config)
    labels = config.get("id2label")
    labels = labels if isinstance(labels, dict) else {}
    named = [labels.get(str(number)) for number in range(len(labels))]
    names = _texts(named) if not all(str(name).startswith("LABEL_") for name in named) else ()
    classes = len(labels) or config.get("num_labels") or 2  # the library's default

    def build(classes: int, shape: Shape, most: int) -> nn.Module:
        with suppress(Refused):
            import_torchvision()  # transformers imports it too, if it is there
        transformers = import_extra("transformers", "hf")
        if kind not in transformers.CONFIG_MAPPING:
            raise Refused(f"{CONFIG}: transformers has no model of the type {kind!r}, and code of a folder is not run")
        kept = {key: value for key, value in config.items() if key not in LOST and not key.startswith("_")}
        with guarded(f"building {kind} of transformers"):
            made = transformers.CONFIG_MAPPING[kind].from_dict(kept)
            if len(labels) != classes:
                made.num_labels = classes
            return _within(most, lambda: transformers.AutoModelForImageClassification.from_config(made)).float()

    channels, side = config.get("num_channels", 3), config.get("image_size", 224)
    height, width = _size(processor) or _size({"size": side}) or (224, 224)
    mean, std = _normalisation(processor)
    source = f"{PROCESSOR}" if processor else f"{CONFIG}"
    return Described(
        f"transformers:{kind}", build, int(classes), names, (int(channels), height, width), mean, std, source
    )


def _within(most: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Builds a network after checking that it has at most `most` parameters."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in make().parameters())
    if size > most:
        raise Refused(f"{CONFIG} describes a network with {size} parameters, but the weights have at most {most}")
    return make()


def _normalisation(processor: dict[str, Any]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation for pixels in [0, 1], whatever range a processor scales pixels to."""
    mean, std = _numbers(processor.get("image_mean")), _numbers(processor.get("image_std"))
    if not processor:
        return None, None
    if mean is None or std is None or processor.get("do_normalize") is False:
        mean, std = (0.0,), (1.0,)
    scale = 255 * float(processor.get("rescale_factor") or 1 / 255) if processor.get("do_rescale", True) else 255.0
    return tuple(x / scale for x in mean), tuple(x / scale for x in std)


def _size(processor: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width to which a processor crops or resizes images."""
    crop = processor.get("crop_size") if processor.get("do_center_crop") else None
    size = crop or processor.get("size")
    if isinstance(size, dict):
        shortest = size.get("shortest_edge")
        size = [size.get("height", shortest), size.get("width", shortest)]
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if isinstance(height, int) and isinstance(width, int) and 1 <= min(height, width) <= max(height, width) <= 1024:
        return height, width
    return None


def _check(config: dict[str, Any]) -> None:
    """Refuses a configuration that refers to another model, or whose numbers are implausibly large."""
    for key, value in config.items():
        if "backbone" in key and value:
            raise Refused(f"{CONFIG}: {show(key)} names another model, which is not downloaded")
        numbers = value if isinstance(value, list) else [value]
        layers = re.search(r"layer|depth|block|stage|repeat", key)
        counts = [x for x in numbers if isinstance(x, int)]
        if key not in LOST and (sum(counts) > DEEPEST if layers else max(counts, default=0) > WIDEST):
            raise Refused(f"{CONFIG}: {show(key)} {str(counts)[:100]} is implausibly large")


def _json(path: Path) -> dict[str, Any] | None:
    """A small JSON object; None for anything else."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _plain(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= 100 and all(_plain(each) for each in value)
    return isinstance(value, bool) or (isinstance(value, int | float) and abs(value) <= WIDEST)


def _numbers(value: object) -> tuple[float, ...] | None:
    values = value if isinstance(value, list) else []
    return tuple(map(float, values)) if values and all(isinstance(x, int | float) for x in values) else None


def _sides(value: object) -> Shape | None:
    if isinstance(value, list) and len(value) == 3 and all(isinstance(x, int) and 1 <= x <= 1024 for x in value):
        return value[0], value[1], value[2]
    return None


def _texts(value: object) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else []
    told = tuple(texts) if all(isinstance(x, str) and x for x in texts) else ()
    return tuple(map(foreign.name, told))
