"""Weights as arrays without names, in the order of the state dict, as in federated learning."""

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dhbe import files
from dhbe.checkpoint import State
from dhbe.containers import Container
from dhbe.data import read_pack
from dhbe.errors import Refused
from dhbe.matching import Match, in_order
from dhbe.pickles import DTYPES

NAME = re.compile(r"arr_(\d+)(\.npy)?")
"""NumPy's names for arrays saved without names."""

MOST = 100_000
"""Maximum number of arrays in a file."""


class Arrays(Container):
    """Writes an .npz file with the arrays in the same order."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("clean.npz",)

    def match(self, network: nn.Module, tensors: Mapping[str, Tensor], weights: str | None) -> Match:
        return in_order(network, tensors)

    def content(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        stream = io.BytesIO()
        np.savez(stream, *(tensor.numpy() for tensor in tensors.values()))
        return {"clean.npz": stream.getvalue()}


def read(path: Path) -> State:
    """Reads `arr_0`, `arr_1`, ... of an .npz file; they are matched to the network's names on loading.

    Raises:
        Refused: It is not such a file, or an array does not hold plain, finite numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = [NAME.fullmatch(name) for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise Refused(f"{path} is not a complete .npz file: download it again") from error
    if not found or not all(found) or len(found) > MOST:
        raise Refused(
            f"{path} is an .npz file, but does not hold the weights of a network as arr_0, arr_1, ...: give these, in the "
            "order of model.state_dict(), or a .safetensors file"
        )
    keys = [f"arr_{number}" for number in range(len(found))]
    tensors = {}
    for key, array in read_pack(path, keys).items():
        try:
            tensor = torch.from_numpy(np.array(array))
        except TypeError:
            tensor = torch.zeros(1, dtype=torch.complex64)
        if tensor.dtype not in DTYPES or not tensor.float().isfinite().all():
            raise Refused(f"{path}: {key} ({array.dtype}) does not hold plain, finite numbers")
        tensors[key] = tensor
    return State(tensors, "", "", files.sha256(path), container=Arrays())
