"""Model formats other than single files of torch and safetensors."""

from collections.abc import Callable
from pathlib import Path

from dhbe import checkpoint
from dhbe.checkpoint import State
from dhbe.errors import Refused
from dhbe.formats import arrays, graph, hub
from dhbe.formats.graph import export
from dhbe.formats.hub import Described, described

__all__ = ["Described", "described", "export", "read", "sources"]

KERAS = "a Keras file: export it with tf2onnx, or copy its weights into a torch network"
TENSORFLOW = "a TensorFlow file: export the network that it was made from with tf2onnx"
ELSEWHERE = {".h5": KERAS, ".hdf5": KERAS, ".keras": KERAS, ".pb": TENSORFLOW, ".tflite": TENSORFLOW}
"""Descriptions of other libraries' files by suffix, with advice."""


def read(path: Path, weights: str | None = None) -> State:
    """Reads the weights of a model in any supported format; for single files see `checkpoint.read`.

    Args:
        path: A file, or a folder of a model hub.
        weights: Which of several state dicts.

    Raises:
        Refused: It is not a model, or its format is not supported; the message says how to export it.
    """
    if _is(Path.is_dir, path):
        return hub.read(path, weights)
    if path.suffix.lower() == ".npz":
        return arrays.read(path)
    if path.suffix.lower() == ".onnx":
        return graph.read(path)
    if path.suffix.lower() in ELSEWHERE and _is(Path.is_file, path):
        raise Refused(f"{path} is {ELSEWHERE[path.suffix.lower()]}")
    return checkpoint.read(path, weights)


def sources(path: Path) -> list[Path]:
    """All paths from which a model may be read: its file or folder, and the files that belong to it."""
    if _is(Path.is_dir, path):
        return [path, *sorted(path.iterdir())]
    beside = [path.with_name(name) for name in (hub.CONFIG, hub.PROCESSOR, f"{path.name}.data")]
    return [path, *(each for each in beside if _is(Path.exists, each))]


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    try:
        return kind(path)
    except (OSError, ValueError):  # a name too long, a folder without permission: reading reports it
        return False
