"""ONNX files: weights are matched to the network of `--arch` by graph order and shape, and written back into the same graph.

Files are not trusted: only plain layers are accepted, sizes are inferred before anything is computed, and finally
onnxruntime must compute the same as the network. An external data file is read only if it is named after the model's file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dhbe import files
from dhbe.checkpoint import State
from dhbe.classifier import logits_in
from dhbe.containers import Container
from dhbe.errors import Refused
from dhbe.matching import Match, show, some
from dhbe.networks.external import guarded, import_extra
from dhbe.pickles import DTYPES

PLAIN = set(
    [
        "Add",
        "AveragePool",
        "BatchNormalization",
        "Cast",
        "Clip",
        "Concat",
        "Constant",
        "Conv",
        "Div",
        "Dropout",
        "Elu",
        "Erf",
        "Flatten",
        "Gather",
        "Gemm",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "LogSoftmax",
        "MatMul",
        "MaxPool",
        "Mul",
        "PRelu",
        "ReduceMean",
        "Relu",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Slice",
        "Softmax",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "Transpose",
        "Unsqueeze",
    ]
)
"""Accepted operators; none of them runs others or creates large tensors from small ones."""

MOST = 2**28
"""Maximum number of elements of all results of a graph, for a batch of `BATCH`."""

BATCH = 2
"""Images on which outputs are compared."""

NEAR = 1e-3
"""Largest difference of outputs, relative to the largest output."""


class Layer(NamedTuple):
    """A layer with weights in the graph."""

    kind: str
    """Operator."""
    weights: list[str]
    """Names of its tensors, in the order of torch."""
    turned: bool = False
    """Whether its matrix is [inputs, outputs], the transpose of torch's."""


@dataclass(frozen=True, eq=False)
class Graph(Container):
    """An ONNX model; its weights are written back into it."""

    model: Any

    @property
    def names(self) -> tuple[str, ...]:
        return ("clean.onnx",)

    def match(self, network: nn.Module, tensors: Mapping[str, Tensor], weights: str | None) -> Match:
        """Matches layers in order of computation; where BatchNorm is folded in the graph, folds it in `network` too."""
        theirs = list(_layers(self.model))
        names = [name for layer in theirs for name in layer.weights]
        if len(set(names)) < len(names):
            raise Refused(
                "layers of the ONNX graph share weights and cannot be told apart: ask for a .safetensors file"
            )
        shape = _shape(self.model)
        folded = _fold(network, shape, [layer.kind for layer in theirs])
        ours = _called(network, shape)
        state = network.state_dict()
        found: dict[str, str] = {}
        for (kind, given, _), (name, wanted) in zip(theirs, ours, strict=False):
            shapes = (
                [tuple(tensors[key].shape) for key in given],
                [tuple(state[f"{name}.{key}"].shape) for key in wanted],
            )
            if shapes[0] != shapes[1]:
                raise Refused(
                    f"the ONNX graph does not fit the network: its {kind} {shapes[0]} is where {name} is {shapes[1]}: check --arch"
                )
            found |= {key: f"{name}.{part}" for key, part in zip(given, wanted, strict=True)}
        if len(theirs) != len(ours):
            raise Refused(
                f"the ONNX graph has {len(theirs)} layers with weights, the network {len(ours)}: check --arch"
            )
        said = []
        if folded:
            said.append(
                f"BatchNorm is folded into convolutions of the ONNX graph ({folded}), so the network is built without it there, and "
                "the search lacks its statistics: exporting with training=torch.onnx.TrainingMode.PRESERVE and "
                "do_constant_folding=False keeps them"
            )
        if any(layer.turned for layer in theirs):
            said.append(
                "linear layers of the ONNX graph are stored as [inputs, outputs]; clean.safetensors stores them as torch does"
            )
        return Match(found, tuple(said))

    @property
    def shape(self) -> tuple[int, int, int]:
        return _shape(self.model)

    def check(self, network: nn.Module, shape: tuple[int, int, int]) -> None:
        if shape != _shape(self.model):
            raise Refused(
                f"the ONNX graph takes images of {'x'.join(map(str, _shape(self.model)))}: give that as --input"
            )
        compare(self.model, network, shape)

    def content(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        onnx = import_extra("onnx", "onnx")
        made = type(self.model)()
        made.CopyFrom(self.model)
        turned = _turned(self.model)
        for each in made.graph.initializer:
            if each.name in tensors:
                tensor = tensors[each.name].T if each.name in turned else tensors[each.name]
                each.CopyFrom(onnx.numpy_helper.from_array(tensor.numpy(), each.name))
        return {"clean.onnx": made.SerializeToString()}


def read(path: Path) -> State:
    """Reads the weights of an ONNX file.

    Raises:
        Refused: It is not an ONNX file, or its graph has operators other than plain layers.
    """
    onnx = import_extra("onnx", "onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # parsers of hostile bytes may raise anything
        raise Refused(f"{path} is broken or not an ONNX file: download it again") from error
    strange = sorted({node.op_type for node in model.graph.node if node.op_type not in PLAIN or node.domain})
    if strange or model.functions or model.graph.sparse_initializer or not model.graph.node:
        raise Refused(
            f"{path} has unsupported operators ({some(map(show, strange)) or 'custom functions'}): ask for what "
            "torch.save(model.state_dict(), path) writes"
        )
    beside = path.with_name(f"{path.name}.data")
    arrays = {each.name: _array(each, beside) for each in model.graph.initializer}
    model = _bounded(model, path)
    needed, turned = {name for layer in _layers(model) for name in layer.weights}, _turned(model)
    tensors = {
        name: torch.from_numpy((array.T if name in turned else array).copy())
        for name, array in arrays.items()
        if name in needed
    }
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or not tensor.float().isfinite().all():
            raise Refused(f"{path}: {show(name)} does not hold plain, finite numbers")
    return State(tensors, "", "", files.sha256(path), container=Graph(model))


def export(network: nn.Module, shape: tuple[int, int, int]) -> bytes:
    """Exports a network to an ONNX file for any batch size, and checks that onnxruntime computes the same.

    Raises:
        Refused: The extra is missing, or the network cannot be exported.
    """
    onnx = import_extra("onnx", "onnx")
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with TemporaryDirectory() as folder, guarded("exporting to ONNX"):
        file = Path(folder) / "clean.onnx"
        torch.onnx.export(
            network.eval(), (torch.zeros(BATCH, *shape),), file, **names, dynamo=False,
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip
        compare(onnx.load(file), network, shape)
        return file.read_bytes()


def compare(model: Any, network: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raises `Refused` unless onnxruntime computes the same from the graph as the network."""
    runtime = import_extra("onnxruntime", "onnx")
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    images = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0))
    with guarded("running the ONNX graph"):
        session = runtime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        (given, *_) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        ours = logits_in(network.eval()(images)).float().numpy()
    if given.shape != ours.shape or np.abs(given - ours).max() > NEAR * max(1.0, np.abs(ours).max()):
        raise Refused("the ONNX graph and the network with its weights compute different outputs: check --arch")


def _layers(model: Any) -> Iterator[Layer]:
    """Layers with weights, in the order of the graph."""
    known = {each.name: len(each.dims) for each in model.graph.initializer}
    same = {name: node.input[0] for node in model.graph.node if node.op_type == "Identity" for name in node.output}
    added: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Add" and len(node.input) == 2:
            one, other = (same.get(name, name) for name in node.input)
            added |= {a: b for a, b in ((one, other), (other, one)) if known.get(b) == 1}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul", "BatchNormalization"):
            continue
        weights = [same.get(name, name) for name in node.input[1:]]
        turned = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not any(each.name == "transB" and each.i for each in node.attribute)
        )
        if node.op_type == "MatMul":
            weights += [added[name] for name in node.output if name in added]
        if not weights or not all(name in known for name in weights) or (turned and known[weights[0]] != 2):
            raise Refused("weights of the ONNX graph are computed, not stored: ask for a .safetensors file")
        yield Layer(node.op_type, weights, turned)


def _turned(model: Any) -> set[str]:
    """Names of the matrices that are transposed with respect to torch."""
    return {layer.weights[0] for layer in _layers(model) if layer.turned}


def _called(network: nn.Module, shape: tuple[int, int, int]) -> list[tuple[str, list[str]]]:
    """Layers with weights in order of computation, with the names of their tensors."""
    order: list[tuple[str, list[str]]] = []
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            keys = [key for key in module.state_dict() if key != "num_batches_tracked"]
            hooks.append(module.register_forward_hook(lambda *_, name=name, keys=keys: order.append((name, keys))))
    with guarded("running the network"), torch.no_grad():
        network.eval()(torch.zeros(BATCH, *shape))
    for hook in hooks:
        hook.remove()
    return order


def _fold(network: nn.Module, shape: tuple[int, int, int], kinds: Sequence[str]) -> int:
    """Folds each BatchNorm that follows a convolution into it, if a graph with layers of `kinds` lacks that BatchNorm.

    Returns:
        The number of folded layers.
    """
    left, last, folded = list(kinds), "", 0
    for place, _ in _called(network, shape):
        conv, norm = network.get_submodule(last), network.get_submodule(place)
        if not isinstance(norm, nn.BatchNorm2d) or left[:1] == ["BatchNormalization"]:
            del left[:1]
        elif isinstance(conv, nn.Conv2d):
            network.set_submodule(last, fuse_conv_bn_eval(conv.eval(), norm.eval()))
            network.set_submodule(place, nn.Identity())
            folded += 1
        last = place
    return folded


def _array(each: Any, beside: Path) -> np.ndarray:
    """The values of an initialiser, from the model's file or from its external data file."""
    onnx = import_extra("onnx", "onnx")
    if each.data_location == each.EXTERNAL:
        told = {entry.key: entry.value for entry in each.external_data}
        offset, length = (int(told.get(key) or 0) for key in ("offset", "length"))
        if (
            told.get("location") != beside.name
            or not beside.is_file()
            or not 0 <= offset <= offset + length <= beside.stat().st_size
        ):
            raise Refused(
                f"the ONNX file stores its weights in another file, and only {beside.name} is supported: provide that file"
            )
        with beside.open("rb") as stream:
            stream.seek(offset)
            each.raw_data = stream.read(length)
        each.ClearField("external_data")
        each.data_location = each.DEFAULT
    with guarded("reading the weights of the ONNX graph"):
        return onnx.numpy_helper.to_array(each)


def _shape(model: Any) -> tuple[int, int, int]:
    sides = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    return sides[1], sides[2], sides[3]


def _bounded(model: Any, path: Path) -> Any:
    """The model for batches of two, after checking that the sizes of all its results are known and small."""
    onnx = import_extra("onnx", "onnx")
    stored = {each.name for each in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in stored]
    sides = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    if len(sides) != 4 or not all(1 <= side <= 1024 for side in sides[1:]):
        raise Refused(f"{path}: the ONNX graph must take images [n, c, h, w] of a fixed size, and nothing else")
    for each in (inputs[0], *model.graph.output):
        if each.type.tensor_type.shape.dim:
            each.type.tensor_type.shape.dim[0].dim_value = BATCH
    with guarded("inferring the sizes of the ONNX graph"):
        sized = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    known = {each.name: each.type.tensor_type.shape for each in (*sized.graph.value_info, *sized.graph.output)}
    total = 0
    for node in model.graph.node:
        for name in node.output:
            dims = [dim.dim_value for dim in known[name].dim] if name in known else [MOST]
            total += int(np.prod([float(max(dim, 1)) for dim in dims]))
    if total >= MOST:
        raise Refused(f"{path}: the results of the ONNX graph are too large, or of unknown size: it is not run")
    return model
