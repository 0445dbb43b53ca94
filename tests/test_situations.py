"""What people bring: a file, folder or network as it comes, a command, and what must come of it: the right ACC or line."""

import argparse
import gzip
import json
import os
import re
import shlex
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY
from PIL import Image
from torch import nn

from dhbe import checkpoint, containers, networks, suspects
from dhbe.classifier import Classifier
from dhbe.cli import main
from dhbe.data import NORMALISATION, load
from dhbe.networks.external import import_torchvision
from dhbe.training import Fit

FED = "--input 3x16x16 --mean .5 --std .25"
SCORE = f"score model.pt --arch resnet8 --classes 10 {FED} --data digits16"
GOOD = 0.9
"""ACC of the model, and above; every way of reading it wrongly is far below."""


@dataclass(frozen=True)
class Situation:
    """What lies there, what is asked, and what must come of it."""

    make: Callable[["Bench"], None]
    command: str = SCORE
    right: bool = True
    """Whether it is scored as the model's own ACC; else it is refused."""
    said: tuple[str, ...] = field(default=())
    """Expressions, each of which must be found in a line on stderr."""


@dataclass(frozen=True)
class Bench:
    """A folder, a trained ResNet-8 and its data, from which situations are made."""

    state: dict[str, torch.Tensor]
    test: object
    folder: Path

    def wrong(self):
        """Weights of the same form that know nothing."""
        random = torch.Generator().manual_seed(3)
        return {
            key: torch.randn(value.shape, generator=random) if key.endswith("conv1.weight") else value.clone()
            for key, value in self.state.items()
        }

    def pt(self, content, name="model.pt"):
        torch.save(content, self.folder / name)

    def code(self, text, name="v.py"):
        (self.folder / name).write_text(
            f"import torch\nfrom torch import nn\nfrom dhbe.networks.resnet import ResNet\n{text}"
        )

    def images(self, names, side=16, labels=range(10)):
        """Test images of some classes as an image folder `d`."""
        for label in labels:
            place = self.folder / "d" / names(label)
            place.mkdir(parents=True)
            for number, pixels in enumerate(self.test.pixels[self.test.labels == label][:12]):
                picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
                picture.resize((side, side), Image.Resampling.NEAREST).save(place / f"{number}.png")


@pytest.fixture(scope="session")
def trained():
    """The weights of a ResNet-8 that knows digits, fed by mean .5 and std .25."""
    data = load("digits16", "train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = networks.build("resnet8", 10, data.shape)
        model = Classifier(network, shape=data.shape, classes=10, mean=(0.5,), std=(0.25,))
        Fit(epochs=4, batch=32, flip=False, crop=1)(model, data)
    return {key: value.clone() for key, value in network.state_dict().items()}


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLAIN = "net = lambda classes: ResNet((1, 1, 1), 16, classes)\n"
V = SCORE.replace("resnet8", "v.py:net")
D = SCORE.replace("digits16", "d")
N = SCORE.replace("digits16", "d.npz")
SHIFTED = "class Net(ResNet):\n    def forward(self, x):\n        return super().forward((x - 127.5) / 63.75)\nnet = lambda classes: Net((1, 1, 1), 16, classes)\n"


def bare(bench):
    bench.pt(bench.state)


def prefixed(prefix, **more):
    return lambda bench: bench.pt({prefix + key: value for key, value in bench.state.items()} | more)


def under(place, **more):
    return lambda bench: bench.pt({place: bench.state, **more})


def folders(names, labels=range(10), side=16, *, files=(), empty=()):
    def make(bench):
        bare(bench)
        bench.images(names, side, labels)
        for name in empty:
            (bench.folder / "d" / name).mkdir()
        for name in files:
            (bench.folder / "d" / name).write_text("hello")
        (bench.folder / "names.txt").write_text("\n".join(WORDS))

    return make


def vendor(text, rename=lambda key: key):
    def make(bench):
        bench.pt({rename(key): value for key, value in bench.state.items()})
        bench.code(PLAIN + text)

    return make


def with_both(other, best):
    return lambda bench: bench.pt({other: bench.wrong(), best: bench.state})


def side_by_side(other, best):
    def make(bench):
        pairs = ((other, bench.wrong()), (best, bench.state))
        bench.pt({f"{name}.{key}": value for name, state in pairs for key, value in state.items()})

    return make


def outputs(expression):
    text = f"class Net(ResNet):\n    def forward(self, x):\n        f = self.features(x)\n        y = self.fc(f)\n        return {expression}\n"
    return vendor(text + "net = lambda classes: Net((1, 1, 1), 16, classes)\n")


def weight_normed(bench):
    """The file splits the head's weight as the older weight_norm does, the network as the newer one does."""
    head = bench.state["fc.weight"]
    split = {"fc.weight_g": head.norm(dim=1, keepdim=True), "fc.weight_v": 3 * head}
    bench.pt({key: value for key, value in bench.state.items() if key != "fc.weight"} | split)
    bench.code(
        "def net(classes):\n    made = ResNet((1, 1, 1), 16, classes)\n"
        "    nn.utils.parametrizations.weight_norm(made.fc)\n    return made\n"
    )


def legacy_names(bench):
    """The vendor's own hook renames what an older version called otherwise."""
    bench.pt({key.replace("fc.", "classifier_head."): value for key, value in bench.state.items()})
    bench.code(
        "def rename(state, prefix, *_):\n    for key in [k for k in state if 'classifier_head' in k]:\n"
        "        state[key.replace('classifier_head', 'fc')] = state.pop(key)\n"
        "class Net(ResNet):\n    def __init__(self, *a):\n        super().__init__(*a)\n"
        "        self._register_load_state_dict_pre_hook(rename)\n"
        "net = lambda classes: Net((1, 1, 1), 16, classes)\n"
    )


def pack(**change):
    """A pack whose images [n, h, w, c] or labels are changed by functions."""

    def make(bench):
        bare(bench)
        pixels, labels = bench.test.pixels[:120], bench.test.labels[:120]
        arrays = {"images": pixels.permute(0, 2, 3, 1).numpy(), "labels": labels.numpy()}
        changed = {name: turn(arrays[name]) for name, turn in change.items()}
        np.savez(bench.folder / "d.npz", **{**arrays, **changed})

    return make


def pictures(turn=Image.Image.copy, suffix="png", **options):
    """A folder of images that are changed by a function and saved in another way."""

    def make(bench):
        folders(str)(bench)
        for path in (bench.folder / "d").rglob("*.png"):
            with Image.open(path) as picture:
                turned = turn(picture)
            path.unlink()
            turned.save(path.with_suffix(f".{suffix}"), **options)

    return make


def beside(**texts):
    """An image folder, a list of the words for its classes, and further files by their path."""

    def make(bench):
        folders(WORDS.__getitem__ if "names" in texts else str)(bench)
        for path, text in texts.items():
            place = bench.folder / ("names.txt" if path == "names" else f"d/{path.replace('_', '/')}.csv")
            place.write_text(text)

    return make


def rows(order, labels=()):
    """The model with its classes in another order, a number for each row of its head; -1 is a row that never wins."""

    def make(bench):
        weight, bias = (torch.cat([bench.state[f"fc.{name}"], torch.full_like(bench.state[f"fc.{name}"][:1], -9 * (name == "bias"))])
                        for name in ("weight", "bias"))  # fmt: skip
        bench.pt({**bench.state, "fc.weight": weight[list(order)], "fc.bias": bias[list(order)]})
        if labels:
            bench.images(str)
            for name in labels:
                (bench.folder / "d" / name).mkdir()

    return make


def renamed(name, **more):
    """The state dict at `name` of the file, with the names of a widespread repository, and what lies beside it."""
    return lambda bench: bench.pt({
        name: {f"module.{key}".replace("downsample", "shortcut").replace("fc.", "linear."): value for key, value in bench.state.items()},
        **more,
    })  # fmt: skip


def two_parts(bench):
    bench.pt({"meta": {}, "state_dict": {("head." if key.startswith("fc") else "backbone.") + key: value
                                         for key, value in bench.state.items()}})  # fmt: skip


def with_constants(prefix, names, values, network=""):
    mean, std = (torch.full((3, 1, 1), value) for value in values)
    return lambda bench: bench.pt(
        {
            f"{prefix}{names[0]}": mean,
            f"{prefix}{names[1]}": std,
            **{network + key: value for key, value in bench.state.items()},
        }
    )


def swapped(bench):
    other = {f"module.{key}": value for key, value in bench.wrong().items()}
    bench.pt(
        {
            "meta": {"mmengine_version": "0.10.4"},
            "state_dict": bench.state,
            "ema_state_dict": {"steps": torch.tensor(9), **other},
        }
    )


def nameless_average(bench):
    shadow = [value for key, value in bench.state.items() if "running" not in key and "num" not in key]
    bench.pt({"model": bench.state, "ema": {"decay": 0.9, "shadow_params": shadow}})


def masked(bench):
    weight = bench.state["conv1.weight"]
    rest = {key: value for key, value in bench.state.items() if key != "conv1.weight"}
    bench.pt({**rest, "conv1.weight_orig": weight, "conv1.weight_mask": torch.ones_like(weight)})


def raw(content):
    return lambda bench: (bench.folder / "model.pt").write_bytes(content)


def zipped(bench):
    bare(bench)
    with zipfile.ZipFile(bench.folder / "all.zip", "w") as archive:
        archive.write("model.pt", "files/resnet.pth")
    (bench.folder / "all.zip").replace(bench.folder / "model.pt")


def folded(bench):
    """Without the BatchNorm layers, whose shifts are in the convolutions."""
    bench.pt({key: value for key, value in bench.state.items() if "bn" not in key} | {"conv1.bias": torch.ones(16)})


class AttributeDict(dict):
    """Settings as Lightning keeps them."""


AttributeDict.__module__ = "pytorch_lightning.utilities.parsing"


def lightning(bench):
    module = ModuleType(AttributeDict.__module__)
    module.AttributeDict = AttributeDict
    names = ("pytorch_lightning", "pytorch_lightning.utilities", module.__name__)
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names, module))
    try:
        settings = AttributeDict(lr=0.1, criterion=nn.CrossEntropyLoss(torch.ones(10)), version=torch.__version__)
        bench.pt(
            {"state_dict": {f"model.{key}": value for key, value in bench.state.items()}, "hyper_parameters": settings}
        )
    finally:
        for name, value in before.items():
            sys.modules.pop(name) if value is None else sys.modules.update({name: value})


def package(bench):
    bare(bench)
    (bench.folder / "models").mkdir()
    (bench.folder / "models" / "parts.py").write_text("from dhbe.networks.resnet import ResNet\n")
    (bench.folder / "models" / "small.py").write_text("from .parts import ResNet\n" + PLAIN)


def norm_less(bench):
    bench.pt({key: value for key, value in bench.state.items() if "running" not in key})


VIEW = (
    "class Net(ResNet):\n    def features(self, x):\n"
    "        x = torch.relu(self.bn1(self.conv1(x)))\n"
    "        for name in self.stages:\n            x = self.get_submodule(name)(x)\n"
    "        return nn.functional.avg_pool2d(x, 2).view(x.size(0), -1).view(x.size(0), 64, -1).mean(2)\n"
    "net = lambda classes: Net((1, 1, 1), 16, classes)\n"
)
SITUATIONS = {
    # Which class is a folder?
    "folders called by numbers": Situation(folders(str), D),
    "a folder of class 0 is missing": Situation(folders(str, range(1, 10)), D),
    "numbers with leading zeros": Situation(folders("{:05d}".format), D),
    "empty folders of classes, a list and a README beside": Situation(
        folders(str, range(3, 10), files=["classes.txt", "README"], empty=["0"]), D
    ),
    "notebooks leave a hidden folder": Situation(folders(str, empty=[".ipynb_checkpoints"]), D),
    "folders called by words": Situation(
        folders(WORDS.__getitem__, range(8)), D, right=False, said=("8 class folders.*model has 10 classes.*--class-names",)
    ),
    "words in the order of a list": Situation(folders(WORDS.__getitem__), f"{D} --class-names names.txt", said=("0=zero, 1=one",)),
    "words with one missing, and a list": Situation(
        folders(WORDS.__getitem__, range(1, 10)), f"{D} --class-names names.txt", said=("1=one, 2=two",)
    ),
    "as many words, in another order": Situation(
        folders(WORDS.__getitem__), D, right=None, said=("classes of d: 0=eight, 1=five", "in another order it is 9.*--class-names")
    ),
    "numbers from 1": Situation(folders(lambda n: str(n + 1)), D, right=False, said=("labels up to 10, the model has 10 classes",)),
    "larger images": Situation(folders(str, side=48), D, said=("120 of 120 images were shrunk from 48x48",)),
    "smaller images": Situation(folders(str, side=8), D, right=None, said=("120 of 120 images were enlarged from 8x8",)),
    "images that are not square": Situation(
        folders(str), D.replace("3x16x16", "3x16x24"), right=None, said=("120 of 120 images were enlarged from 16x16 .* to 24x16",)
    ),
    "a folder called as a data set": Situation(
        lambda bench: (bare(bench), (bench.folder / "digits16").mkdir()), said=(r"for the local file or folder, give \./digits16",)
    ),
    "numbers that were sorted as words in training": Situation(
        rows([0, 1, -1, -1, *range(2, 10)], ["10", "11"]), D.replace("--classes 10", "--classes 12"), right=None,
        said=("ACC 20.*in another order it is 9.*sorts folders as words",),
    ),
    "a class of the background before the others": Situation(
        rows([-1, *range(10)]), SCORE.replace("--classes 10", "--classes 11"), right=None, said=("in another order it is 9",)
    ),
    "images in a folder below their class's": Situation(folders(lambda n: f"{n}/images"), D),
    "a table between the images of a class": Situation(beside(**{"3_GT": "1.png;16;16"}), D),
    "parts called training and validation": Situation(
        lambda bench: (folders(lambda n: f"Training/{n}")(bench), bench.images(lambda n: f"validation/{n}")), D
    ),
    "class folders one level deeper": Situation(
        folders(lambda n: f"archive/{n}"), D, right=False, said=("the only folder archive in d holds class folders .*: give d/archive",)
    ),
    "parts with names of their own": Situation(
        lambda bench: (folders(lambda n: f"fold1/{n}")(bench), bench.images(lambda n: f"fold2/{n}")), D,
        right=False, said=("each of the folders fold1, fold2 in d holds class folders .*: give d/fold1",),
    ),
    "images beside a table of labels": Situation(
        lambda bench: (folders(str)(bench), (bench.folder / "d" / "0" / "1.png").rename(bench.folder / "d" / "a.png")), D,
        right=False, said=("a.png lies beside the class folders",),
    ),
    "identifiers with descriptions as a list of classes": Situation(
        beside(names="\n".join(f"{word} digit, {word}" for word in WORDS)), f"{D} --class-names names.txt", said=("0=zero, 1=one",)
    ),
    "a list of classes in JSON": Situation(
        beside(names=json.dumps(dict(enumerate(WORDS)), indent=1)), f"{D} --class-names names.txt", said=("0=zero, 1=one",)
    ),
    # How images lie in files
    "grey image files": Situation(pictures(lambda picture: picture.convert("L")), D),
    "image files in the colours of print": Situation(pictures(lambda picture: picture.convert("CMYK"), "jpg", quality=99), D),
    "sixteen bits a channel": Situation(
        pictures(lambda picture: Image.fromarray(np.array(picture.convert("L")).astype(np.uint16) * 257)), D,
        right=False, said=("more than 8 bits per channel",),
    ),
    "a camera's note that an image is to be turned": Situation(
        pictures(suffix="jpg", quality=99, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0"), D,
        said=("120 of 120 images are to be turned",),
    ),
    "transparent pixels": Situation(
        pictures(lambda picture: picture.putalpha(Image.new("L", picture.size, 200)) or picture), D, said=("120 of 120 images have transparent",)
    ),
    "channels first": Situation(pack(images=lambda x: x.transpose(0, 3, 1, 2)), N),
    "pixels in 0..1": Situation(pack(images=lambda x: x / 255), N, right=False, said=(r"save \(255 \* images\)\.round",)),
    "floats in 0..255": Situation(pack(images=lambda x: x.astype(np.float32)), N, right=False, said=(r"save images\.round",)),
    "normalised pixels": Situation(pack(images=lambda x: x / 64 - 2), N, right=False, said=("before any normalisation",)),
    "labels as rows with a one": Situation(pack(labels=lambda y: np.eye(10)[y]), N),
    "labels with several ones": Situation(
        pack(labels=lambda y: np.eye(10)[y] + np.eye(10)[0] > 0), N, right=False, said=("one class per image",)
    ),
    "labels in a column": Situation(pack(labels=lambda y: y[:, None]), N),
    "labels as floats": Situation(pack(labels=lambda y: y.astype(float)), N),
    "labels from 1": Situation(pack(labels=lambda y: y + 1), N, right=False, said=("labels up to 10, the model has 10 classes",)),
    "arrays with the names of another library": Situation(
        lambda bench: (bare(bench), np.savez("d.npz", x_train=[0], y_train=[0], x_test=[0], y_test=[0])), N,
        right=False, said=(r"numpy.savez\('test.npz', images=old\['x_test'\], labels=old\['y_test'\]\)",),
    ),
    "a table of Parquet": Situation(
        lambda bench: (bare(bench), (bench.folder / "d.parquet").write_bytes(b"PAR1")), SCORE.replace("digits16", "d.parquet"),
        right=False, said=("d.parquet is neither an image folder nor an .npz",),
    ),
    # Which weights?
    "model beside model_ema": Situation(with_both("model", "model_ema"), said=(r"weights \(model\) and their average \(model_ema\)",)),
    "state_dict beside state_dict_ema": Situation(with_both("state_dict", "state_dict_ema"), said=("--weights selects another",)),
    "the average, lying deeper": Situation(
        lambda bench: bench.pt({"model": bench.wrong(), "ema": {"decay": 0.9, "module": bench.state}}), said=(r"average \(ema.module\)",)
    ),
    "the weights named": Situation(with_both("model_ema", "model"), f"{SCORE} --weights model"),
    "weights that are not there": Situation(
        with_both("model", "model_ema"), f"{SCORE} --weights best", right=False, said=("no state dict best, but model, model_ema",)
    ),
    "student and teacher": Situation(
        with_both("student", "teacher"), right=False, said=("add --weights with one of student, teacher",)
    ),
    "the teacher, named": Situation(with_both("student", "teacher"), f"{SCORE} --weights teacher"),
    "student and teacher in one state dict": Situation(
        side_by_side("student", "teacher"), right=False, said=("several networks that fit: add --weights with one of student, teacher",)
    ),
    "the teacher in one state dict, named": Situation(
        side_by_side("student", "teacher"), f"{SCORE} --weights teacher", said=(r"other networks that fit \(student\): they are not cleaned",)
    ),
    "an average beside the weights in one state dict": Situation(
        side_by_side("model", "model_ema.module"), said=("weights and their average",)
    ),
    "the best state beside the last one": Situation(
        with_both("model", "best_model"), right=False, said=("add --weights with one of model, best_model",)
    ),
    "state_dict holds the average already, as mmengine saves it": Situation(
        swapped, said=(r"weights \(ema_state_dict\) and their average \(state_dict\): using the average",)
    ),
    "the same network twice, as an attacker keeps it": Situation(
        lambda bench: bench.pt({"model": {f"module.{place}{key}": value for place in ("model.", "attacker.model.")
                                          for key, value in bench.state.items()}})
    ),
    "an average without names": Situation(nameless_average, said=("weights without names .ema.shadow_params. are neither read",)),
    "what a benchmark of attacks leaves": Situation(
        under("model", model_name="resnet8", num_classes=10, img_size=(16, 16, 3), clean_data="digits", data_path="../data",
              bd_train={"bd_data_container": {"data_dict": {}}, "original_index_array": np.arange(5), "poison_indicator": np.zeros(5)})
    ),
    "a module of DeepSpeed": Situation(
        under("module", buffer_names=[], optimizer=None, param_shapes=[{"fc.bias": torch.Size([10])}], ds_version="0.14", dp_world_size=2)
    ),
    "weights sharded by DeepSpeed": Situation(
        lambda bench: bench.pt({"module": {key: value if "running" in key else torch.empty(0) for key, value in bench.state.items()}}),
        right=False, said=("zero_to_fp32.py",),
    ),
    "parameters flattened by FSDP": Situation(
        lambda bench: bench.pt({"_flat_param": torch.ones(99), "layer1._flat_param": torch.ones(9)}), right=False, said=("FULL_STATE_DICT",)
    ),
    "an optimizer of fastai": Situation(under("model", opt={"state": [{"grad_avg": torch.ones(3, 3)}], "hypers": [{"lr": 0.1}]})),
    "a cascade of several networks": Situation(
        lambda bench: bench.pt({"state_dict": [bench.state, bench.state]}), right=False, said=("no tensors in a state dict",)
    ),
    "weights and an epoch in a pair": Situation(lambda bench: bench.pt((bench.state, 9)), right=False, said=("holds a tuple",)),
    "the epoch between the tensors": Situation(lambda bench: bench.pt({**bench.state, "epoch": 9, "arch": "resnet8"})),
    "a web page in place of the model": Situation(
        raw(b"<!DOCTYPE html><html><head><title>Virus scan warning"), right=False, said=("is a web page, not the model",)
    ),
    "a pointer of Git LFS": Situation(raw(b"version https://git-lfs.github.com/spec/v1\noid"), right=False, said=("git lfs pull",)),
    "a packed file": Situation(raw(gzip.compress(b"model")), right=False, said=("is a packed archive: unpack it",)),
    "a model in a zip archive": Situation(zipped, right=False, said=("holds files/resnet.pth|holds resnet.pth",)),
    "Keras's weights under torch's suffix": Situation(raw(b"\x89HDF\r\n\x1a\n"), right=False, said=("HDF5",)),
    "an optimizer of names": Situation(
        under("model", optimizer={"state": {"fc.weight": {"exp_avg": torch.ones(10, 64)}}}, epoch=3)
    ),
    "a critic of another form": Situation(under("net", critic={"w": torch.ones(3, 3)})),
    # Names of tensors
    "averaged by torch": Situation(prefixed("module.", n_averaged=torch.tensor(5))),
    "a criterion beside the model, as Lightning keeps it": Situation(
        lambda bench: bench.pt(
            {"state_dict": {**{f"model.{k}": v for k, v in bench.state.items()}, "criterion.weight": torch.ones(10)}}
        ),
        said=("copied unchanged: criterion.weight",),
    ),
    "a criterion beside a bare network": Situation(prefixed("", **{"criterion.weight": torch.ones(10)})),
    "compiled inside": Situation(
        lambda bench: bench.pt({re.sub(r"^layer1\.", "layer1._orig_mod.", k): v for k, v in bench.state.items()})
    ),
    "sharded inside": Situation(
        lambda bench: bench.pt({k.replace("layer1.", "layer1._fsdp_wrapped_module."): v for k, v in bench.state.items()})
    ),
    "parallel inside": Situation(
        lambda bench: bench.pt({k.replace("layer2.", "layer2.module."): v for k, v in bench.state.items()})
    ),
    "counters of operations left by a profiler": Situation(
        prefixed("", total_ops=torch.zeros(1), **{"layer1.total_params": torch.zeros(1)})
    ),
    "shortcut and linear, with the accuracy beside": Situation(renamed("net", acc=95.2, epoch=3)),
    "shortcut and linear, and no architecture told": Situation(
        renamed("net", acc=95.2, epoch=3), SCORE.replace("--arch resnet8 --classes 10", ""), said=("taken for resnet8",)
    ),
    "a backbone and a head": Situation(two_parts, said=("lies in several places; taken from head.fc.weight",)),
    "trained with differential privacy": Situation(prefixed("_module.")),
    "masks of pruning": Situation(masked, right=False, said=("torch.nn.utils.prune.remove",)),
    "an adapter without its network": Situation(
        lambda bench: bench.pt({"base_model.model.fc.lora_A.weight": torch.ones(8, 64)}), right=False, said=("merge_and_unload",)
    ),
    "BatchNorm folded into convolutions": Situation(folded, right=False, said=("BatchNorm layers seem to be folded",)),
    "an encoder of a momentum pair": Situation(prefixed("module.encoder_q.")),
    "without batch counters": Situation(
        lambda bench: bench.pt({k: v for k, v in bench.state.items() if "num_batches" not in k})
    ),
    "without BatchNorm's statistics": Situation(norm_less, right=False, said=("BatchNorm statistics are missing",)),
    "a network inside the vendor's": Situation(
        vendor(
            "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.backbone = ResNet((1, 1, 1), 16, 10)\n"
            "    def forward(self, x):\n        return self.backbone(x)\nnet = Net\n"
        ),
        V,
    ),
    "weight_norm, older and newer": Situation(weight_normed, V),
    "the vendor's own renaming": Situation(legacy_names, V),
    "an auxiliary head is absent": Situation(
        vendor(
            "class Net(ResNet):\n    def __init__(self, *a):\n        super().__init__(*a)\n        self.aux1 = nn.Linear(64, 10)\n"
            "net = lambda classes: Net((1, 1, 1), 16, classes)\n"
        ),
        V,
        said=("the file lacks aux1",),
    ),
    "an auxiliary head too much": Situation(prefixed("", **{"aux1.fc.weight": torch.ones(10, 64)})),
    "a mask that the network computes": Situation(prefixed("", **{"layer1.attn_mask": torch.ones(4, 4)})),
    "another width": Situation(bare, SCORE.replace("resnet8", "resnet20"), right=False, said=("the network has layers that the file lacks",)),
    "another number of classes": Situation(
        bare, SCORE.replace("--classes 10", "--classes 11"), right=False, said=("last layer has 10 classes: give --classes=10",)
    ),
    "grey images": Situation(
        lambda bench: bench.pt(bench.state | {"conv1.weight": bench.state["conv1.weight"].sum(1, keepdim=True)}),
        right=False, said=("first layer takes 1 channels: give --input=1xHxW",),
    ),
    "a larger stem": Situation(
        lambda bench: bench.pt(bench.state | {"conv1.weight": torch.ones(16, 3, 7, 7)}), right=False, said=("first kernel is 7x7",)
    ),
    # What lies beside the weights
    "settings in a Namespace": Situation(under("model", args=argparse.Namespace(lr=0.1, output_dir=Path("/x")))),
    "settings in a SimpleNamespace, a set, a defaultdict": Situation(
        under("model", a=SimpleNamespace(b={1, 2}), b=defaultdict(list, acc=[0.5]), c=Path("x"))
    ),
    "settings of Lightning with a loss": Situation(lightning),
    "numpy's best accuracy": Situation(under("state_dict", best_acc=np.float64(0.9))),
    "half precision": Situation(lambda bench: bench.pt({k: v.half() if v.is_floating_point() else v for k, v in bench.state.items()})),
    "bfloat16": Situation(lambda bench: bench.pt({k: v.bfloat16() if v.is_floating_point() else v for k, v in bench.state.items()})),
    "safetensors under another name": Situation(
        lambda bench: (bench.folder / "model.pt").write_bytes(safetensors.torch.save(bench.state))
    ),
    "a program in a Namespace": Situation(
        under("model", args=argparse.Namespace(hook=SimpleNamespace(f=os.system))), right=False, said=("system; nothing was run",)
    ),
    "a whole network": Situation(
        lambda bench: bench.pt(nn.Sequential(nn.Linear(2, 2))), right=False, said=(r"torch.save\(model.state_dict\(\), path\)",)
    ),
    # How images are fed
    "mean and std in 0..255": Situation(
        bare, SCORE.replace(".5 --std .25", "127.5 --std 63.75"), right=False, said=("--mean 0.5 --std 0.25",)
    ),
    "constants in 0..255 in the file": Situation(
        with_constants("data_preprocessor.", ("mean", "std"), (127.5, 63.75)), SCORE.replace("--mean .5 --std .25", ""),
        said=(r"its own normalisation \(0.5 0.5 0.5; 0.25 0.25 0.25, in data_preprocessor.mean\): no --mean or --std given: taken from there",),
    ),
    "constants in the file, and others given": Situation(
        with_constants("", ("mu", "sigma"), (0.4, 0.2)), said=("the given constants are used",)
    ),
    "a layer that normalises first": Situation(
        with_constants("0.", ("mean", "std"), (0.5, 0.25), "1."), SCORE.replace("--mean .5 --std .25", ""), said=("taken from there",)
    ),
    "code that takes pixels in 0..255": Situation(vendor(SHIFTED), V.replace(".5 --std .25", "0 --std .0039216")),
    "code that takes pixels in 0..255, untold": Situation(
        vendor(SHIFTED), V.replace("--mean .5 --std .25", ""), right=None, said=("but with --mean=0 --std=.0039216 it is 9",)
    ),
    "no normalisation told": Situation(
        bare, SCORE.replace("--mean .5 --std .25", ""), right=None, said=("no --mean or --std given: assuming that the network expects pixels",)
    ),
    "mean alone": Situation(
        bare, SCORE.replace("--std .25", ""), right=None, said=("--mean without --std: the mean is subtracted, and the standard deviation is taken as 1",)
    ),
    "mean by name": Situation(bare, SCORE.replace(".5 --std .25", "imagenet --std imagenet")),
    "an upside-down normalisation": Situation(
        bare, SCORE.replace(".5 --std .25", "1 --std .004"), right=None, said=(r"no better than chance, but with --mean=\S+( --std=\S+)? it is",)
    ),
    "no architecture told": Situation(
        bare, SCORE.replace("--arch resnet8 --classes 10", ""), said=("taken for resnet8: stem stride 1, no max-pooling",)
    ),
    "an architecture with a twin": Situation(
        lambda bench: bench.pt(networks.build("resnet18", 10, (3, 16, 16)).state_dict()),
        SCORE.replace("--arch resnet8 --classes 10", ""), right=False,
        said=(r"add --arch=resnet18 \(stem stride 1, no max-pooling\) or --arch=resnet18-64 \(stem stride 1, max-pooling",),
    ),
    "a library's network at its own size": Situation(
        lambda bench: bench.pt(networks.build("timm:resnet10t", 10, (3, 32, 32)).state_dict()),
        "score model.pt --arch timm:resnet10t.c3_in1k --classes 10 --data d.npz", right=False,
        said=("images of 3x176x176, as in timm's", "no --mean or --std given: normalised by 0.485 0.456 0.406", "no data called|not a file|no such"),
    ),
    # What networks return, and how vendors build them
    "logits and features": Situation(outputs("y, f"), V),
    "logits and a picture": Situation(outputs("y, x"), V),
    "features first": Situation(outputs("f, y"), V),
    "a dict without logits": Situation(outputs("{'features': f, 'scores': y}"), V),
    "a main and an auxiliary answer": Situation(outputs("y, y.flip(1)"), V, right=False, said=("several outputs .*add --output",)),
    "the main answer, named": Situation(outputs("y, y.flip(1)"), f"{V} --output 0"),
    "the auxiliary answer, named": Situation(outputs("{'aux': y.flip(1), 'main': y}"), f"{V} --output main"),
    "log-probabilities": Situation(outputs("y.log_softmax(1)"), V),
    "logits with the axes of an image": Situation(outputs("y[:, :, None, None]"), V, right=False, said=("must return logits",)),
    "one output for two classes": Situation(
        rows([0]), SCORE.replace("--classes 10", "--classes 2"), right=False, said=("a single output for two classes",)
    ),
    "code that imports from its package": Situation(
        package, SCORE.replace("resnet8", "models/small.py:net"), right=False, said=("give --arch models.small:net",)
    ),
    "code in a package": Situation(package, SCORE.replace("resnet8", "models.small:net")),
    "code that needs a GPU": Situation(
        vendor("net = lambda classes: ResNet((1, 1, 1), 16, classes).to('cuda:7')\n"), V, right=False, said=("v.py:net fails: .*CUDA",)
    ),
    "code that spreads itself over GPUs": Situation(vendor("net = lambda classes: nn.DataParallel(ResNet((1, 1, 1), 16, classes))\n"), V),
    "probabilities": Situation(outputs("y.softmax(1)"), V, said=("returns probabilities",)),
    "a function of n_classes": Situation(vendor("net = lambda n_classes: ResNet((1, 1, 1), 16, n_classes)\n"), V),
    "a function of anything": Situation(
        vendor("def make(n_classes):\n    return ResNet((1, 1, 1), 16, n_classes)\ndef net(**k):\n    return make(**k)\n"), V
    ),
    "a network that flattens with view": Situation(vendor(VIEW), V, said=("requires contiguous tensors",)),
    "vendor code that imports torchvision": Situation(vendor("import torchvision.models\n"), V),
}  # fmt: skip


@pytest.fixture
def bench(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Bench(trained, load("digits16", "test"), tmp_path)


def ran(command, capsys):
    capsys.readouterr()
    code = main(shlex.split(command))
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_people_bring_is_read_right_or_refused_for_the_right_reason(name, bench, capsys):
    situation = SITUATIONS[name]
    situation.make(bench)
    code, out, err = ran(f"{situation.command} --json --quiet", capsys)
    for expression in situation.said:
        assert any(re.search(expression, line) for line in err.splitlines()), err
    assert "Traceback" not in err
    if situation.right is False:
        assert (code, out) == (2, "")
        return
    assert code == 0, err
    found = json.loads(out)
    assert {f"note: {line}" for line in found["warnings"]} == set(err.splitlines())
    if situation.right:
        assert found["acc"] >= GOOD, err


def test_torchvisions_pretrained_variants_are_read(bench):
    """Auxiliary heads and a normalisation inside, as its pretrained GoogLeNet has."""
    models = import_torchvision().models
    network = models.googlenet(
        weights=None, num_classes=10, aux_logits=True, transform_input=True, init_weights=False
    ).eval()
    bench.pt(network.state_dict())
    suspect = suspects.load(Path("model.pt"), arch="torchvision:googlenet")
    assert suspect.info.input == (3, 224, 224)
    assert any("copied unchanged: aux1" in note for note in suspect.warnings)
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in NORMALISATION["imagenet"])
    with torch.no_grad():
        torch.testing.assert_close(suspect.classifier(pixels), network((pixels - mean) / std), rtol=1e-3, atol=1e-4)


def test_a_librarys_network_for_grey_images_is_told_by_its_first_kernel(bench):
    bench.pt(networks.build("torchvision:mobilenet_v2", 10, (1, 64, 64)).state_dict())
    assert suspects.load(Path("model.pt"), arch="torchvision:mobilenet_v2").info.input == (1, 224, 224)


VIEWS = {
    "scan": (f"scan model.pt --arch v.py:net --classes 10 {FED} --warm-up 1 --search-batch 8 --pool-size 16 --out out", (0, 1, 3)),
    "erase": (f"erase model.pt --arch v.py:net --classes 10 {FED} {TINY} --out out", (0,)),
    "verify": (f"verify model.pt model.pt --arch v.py:net --classes 10 {FED} --warm-up 1 --search-batch 8 --pool-size 16 --out out", (0, 1, 3)),
    "defend": (f"defend finetuning model.pt --arch v.py:net --classes 10 {FED} --data digits16 --epochs 1 --images 100 --out out", (0,)),
    "attack": ("attack badnets --data digits16 --arch v.py:net --epochs 1 --force --out out", (0,)),
}  # fmt: skip


@pytest.mark.parametrize("verb", VIEWS)
def test_networks_that_flatten_with_view_take_part_in_everything(verb, bench, capsys):
    vendor(VIEW)(bench)
    command, codes = VIEWS[verb]
    code, _, err = ran(f"{command} --quiet", capsys)
    assert code in codes, err


LAYOUTS = {
    "fp16": SITUATIONS["half precision"].make,
    "bf16": SITUATIONS["bfloat16"].make,
    "ema": with_both("model", "model_ema"),
    "lightning": SITUATIONS["a criterion beside the model, as Lightning keeps it"].make,
    "averaged": prefixed("module.", n_averaged=torch.tensor(5)),
}


def form(state):
    return {key: (value.shape, value.dtype) for key, value in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_comes_back_has_the_form_of_what_was_given(layout, bench, capsys):
    LAYOUTS[layout](bench)
    code, _, err = ran(
        f"erase model.pt --arch resnet8 --classes 10 {FED} {TINY} --lr .03 --lost-agreement 0 --out out --quiet", capsys
    )
    assert code == 0, err
    given = torch.load("model.pt", weights_only=True)
    place = next((key for key in ("model_ema", "model", "state_dict") if key in given), None)
    inner = given[place] if place else given
    assert form(safetensors.torch.load_file("out/clean.safetensors")) == form(inner)
    back = torch.load("out/clean.pt", weights_only=True)
    cleaned = back[place] if place else back
    assert list(form(cleaned).items()) == list(form(inner).items())
    assert not torch.equal(cleaned[next(iter(inner))], inner[next(iter(inner))])
    if layout == "ema":  # nobody who loads the other meets the backdoor
        assert all(torch.equal(back["model"][key], back["model_ema"][key]) for key in inner)


COPIES = (
    ("the same network twice, as an attacker keeps it", None),
    ("an average beside the weights in one state dict", None),
    ("an average beside the weights in one state dict", "model_ema"),
    ("an average beside the weights in one state dict", "model"),
    ("an average without names", None),
    ("state_dict holds the average already, as mmengine saves it", None),
    ("the epoch between the tensors", None),
)


@pytest.mark.parametrize(("name", "weights"), COPIES)
def test_no_copy_of_the_old_weights_comes_back(name, weights, bench):
    SITUATIONS[name].make(bench)
    suspect = suspects.load(
        "model.pt", arch="resnet8", classes=10, input_shape=(3, 16, 16), mean=(0.5,), std=(0.25,), weights=weights
    )
    network, container = suspect.classifier.network, suspect.state.container
    with torch.no_grad():
        network.fc.weight.add_(1)
    tensors = checkpoint.changed(network.state_dict(), suspect.state)
    Path("back.pt").write_bytes(container.content(network, tensors)["clean.pt"])
    back = torch.load("back.pt", weights_only=True)
    heads = [each for each in containers.tensors(back) if each.shape == network.fc.weight.shape]
    assert heads
    assert all(torch.equal(each, network.fc.weight) for each in heads)
    given = torch.load("model.pt", weights_only=True)
    assert {key: value for key, value in back.items() if isinstance(value, int)} == {
        key: value for key, value in given.items() if isinstance(value, int)
    }
