import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dhbe import checkpoint, networks
from dhbe.errors import Refused
from dhbe.networks import ZOO, Guess, build, external, infer, probe

RGB = (3, 32, 32)
SHARED = Path(os.environ.get("DHBE_SHARED", Path(__file__).parents[2] / "shared"))
VICTIMS = SHARED / "data" / "victims"
MILLIONS = {"resnet18": 11.17, "resnet34": 21.28, "wrn16-1": 0.18, "wrn16-2": 0.69, "wrn40-1": 0.56, "wrn40-2": 2.24}


@pytest.fixture
def vendor(tmp_path):
    """Writes the vendor's files and returns the folder."""

    def write(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(f"from torch import nn\n{source}\n")
        return tmp_path

    return write


@pytest.mark.parametrize("arch", ZOO)
def test_every_network_of_the_zoo_is_recognised_from_its_own_tensors(arch):
    shape = (1, 64, 64) if arch.endswith("-64") else (1, 32, 32)
    network = build(arch, 7, shape)
    state = network.state_dict()
    alike = {"resnet18": ("resnet18", "resnet18-64"), "resnet34": ("resnet34", "resnet34-64")}.get(
        arch.removesuffix("-64"), ()
    )
    guess = Guess(None if alike else arch, 7, alike)  # pooling leaves no trace in the shapes of weights
    assert infer(state) == guess
    assert infer(dict(sorted(state.items()))) == guess  # safetensors files are sorted by name
    assert infer({**state, "bn1.weight": torch.ones(5)}) == Guess(None, 7)
    assert infer({key: value for key, value in state.items() if "layer" not in key}).arch is None
    assert probe(network, shape, 7) is False
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    if arch in MILLIONS:
        count = sum(value.numel() for value in build(arch, 10, RGB).parameters())
        assert round(count / 1e6, 2) == MILLIONS[arch]


@pytest.mark.parametrize(("arch", "side"), [("resnet18", 32), ("resnet34", 32), ("resnet18-64", 64)])
def test_residual_networks_compute_what_torchvisions_do(arch, side):
    ours = build(arch, 10, (3, side, side)).eval()
    theirs = build(f"torchvision:{arch.removesuffix('-64')}", 10, (3, side, side)).eval()
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)  # sec. 5.1.2
    if side == 32:
        theirs.maxpool = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, side, side)
    assert torch.equal(ours(images), theirs(images))


def test_classes_are_told_only_where_the_weights_leave_no_doubt():
    head, hidden = torch.ones(10, 8), torch.ones(8, 8)
    assert infer({"classifier.weight": head}) == Guess(None, 10)
    assert infer({"two.weight": hidden, "two.bias": hidden[0], "one.weight": head}).classes == 10
    assert infer({"head.bias": head[0], "head.weight": head, "qkv.weight": hidden}).classes is None
    assert infer({"features": torch.ones(3)}) == Guess(None, None)


@pytest.mark.parametrize(
    ("signature", "classes"), [("classes", 7), ("width=4, num_classes=3", 7), ("", 10), ("*, classes: int = 2", 7)]
)
def test_vendor_functions_are_told_the_number_of_classes_if_they_ask(vendor, signature, classes):
    name = next((word for word in ("num_classes", "classes") if word in signature), "10")
    folder = vendor(net=f"def make({signature}):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, {name}))")
    assert build(f"{folder}/net.py:make", 7, RGB)[1].out_features == classes


def test_vendor_code_may_print_import_its_neighbours_and_be_a_class(vendor, monkeypatch, capsys):
    source = "import helper\nprint('hi')\nclass Net(nn.Linear):\n    def __init__(self): super().__init__(helper.N, 2)"
    folder, before = vendor(vendor_net=source, helper="N = 5"), list(sys.path)
    assert build(f"{folder}/vendor_net.py:Net", 7, RGB).in_features == 5
    assert sys.path == before
    monkeypatch.chdir(folder)
    assert build("vendor_net:Net", 7, RGB).in_features == 5
    assert sys.path == before
    assert capsys.readouterr().out == ""  # stdout belongs to --json


def test_vendors_may_have_neighbours_of_the_same_name(vendor, monkeypatch, tmp_path_factory):
    source = "import neighbour, installed_once\ndef make():\n    import neighbour\n    return nn.Linear(neighbour.N, 2)"
    folder = vendor(net=source, neighbour="N = 5")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "installed_once.py").touch()
    monkeypatch.syspath_prepend(folder / ".venv")
    other = tmp_path_factory.mktemp("other")
    (other / "net.py").write_text((folder / "net.py").read_text())
    (other / "neighbour.py").write_text("N = 6")
    assert build(f"{folder}/net.py:make", 7, RGB).in_features == 5
    assert build(f"{other}/net.py:make", 7, RGB).in_features == 6
    assert "neighbour" not in sys.modules
    assert sys.modules.pop("installed_once", None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make():\n    raise KeyError('cifar\\n10')", "net.py:make fails: KeyError: 'cifar"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--data'])", "net.py:make fails: SystemExit: 2"),
        ("def make(:", "fails: SyntaxError"),
        ("import no_such_package_here", "fails: ModuleNotFoundError: No module named 'no_such_package_here'"),
        ("def other():\n    ...", "no function 'make'; it has other"),
        ("def make():\n    return 3", "returns int instead of a torch.nn.Module"),
        ("def make():\n    return nn.LazyLinear(3)", "lazy layers"),
    ],
)
def test_faults_of_vendor_code_are_one_line(vendor, source, message):
    with pytest.raises(Refused, match=message) as caught:
        build(f"{vendor(net=source)}/net.py:make", 7, RGB)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            "resnet19",
            "unknown architecture 'resnet19' .did you mean resnet18.*: give one of resnet8, .*torchvision:NAME",
        ),
        ("", "unknown architecture"),
        ("net.py:", "unknown architecture"),
        ("no/such/net.py:make", "which is not a file"),
        ("no_such_package:make", "fails: ModuleNotFoundError"),
        ("torchvision:resnet", "torchvision has no classifier 'resnet'; available: resnet101"),
        ("torchvision:fcn_resnet50", "torchvision has no classifier"),
        ("timm:hf-hub:someone/model", "timm has no classifier 'hf-hub:someone/model'"),
    ],
)
def test_unknown_architectures_are_refused_with_what_there_is(arch, message):
    with pytest.raises(Refused, match=message):
        build(arch, 10, RGB)


@pytest.mark.parametrize("arch", ["torchvision:mobilenet_v2", "timm:resnet10t", "timm:vit_tiny_patch16_224"])
def test_networks_of_the_extras_fit_input_and_classes(arch):
    assert probe(build(arch, 7, (3, 64, 64)), (3, 64, 64), 7) is False


@pytest.mark.parametrize(("classes", "shape"), [(1, RGB), (10, (0, 32, 32))])
def test_senseless_sizes_are_refused(classes, shape):
    with pytest.raises(Refused, match=r"a single output for two classes|at least 2 classes and images of 1x1x1"):
        build("resnet8", classes, shape)


@pytest.mark.parametrize("arch", ["torchvision:resnet18", "torchvision:vgg11_bn", "timm:resnet10t"])
def test_networks_of_libraries_take_grey_images_too(arch):
    assert probe(build(arch, 10, (1, 32, 32)), (1, 32, 32), 10) is False


def test_a_missing_extra_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for arch in ("torchvision:resnet18", "timm:resnet18"):
        with pytest.raises(Refused, match=r"pip install 'dhbe\[zoo\]'"):
            build(arch, 10, RGB)


@pytest.mark.parametrize(
    ("failures", "defined", "message"),
    [
        ([], 0, None),
        (["operator torchvision::nms does not exist"], 1, None),
        (["operator torchvision::nms does not exist"] * 2, 1, "importing torchvision fails: RuntimeError: operator"),
        (["libcuda is broken"], 0, "importing torchvision fails: RuntimeError: libcuda is broken"),
    ],
)
def test_torchvision_is_imported_with_and_without_its_compiled_operators(monkeypatch, failures, defined, message):
    failures, torchvision, made = list(failures), SimpleNamespace(), []

    def import_module(name):
        if failures:
            raise RuntimeError(failures.pop(0))
        return torchvision

    def library(*_):
        made.append(SimpleNamespace(define=lambda schema: schemas.append(schema)))
        return made[-1]

    schemas: list[str] = []
    monkeypatch.setattr(external, "_libraries", [])
    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(torch.library, "Library", library)
    if message:
        with pytest.raises(Refused, match=message):
            external.import_torchvision()
    else:
        assert external.import_torchvision() is torchvision
    assert external._libraries == made
    assert len(made) == defined
    assert schemas == [
        f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms") * defined
    ]


class Answers(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


LOGITS = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


@pytest.mark.parametrize(
    ("answer", "softmax"),
    [
        (LOGITS, False),
        (lambda x: (x, LOGITS(x)), False),
        (lambda x: {"logits": LOGITS(x)}, False),
        (lambda x: LOGITS(x).softmax(1), True),
        (lambda x: LOGITS(x).log_softmax(1), False),
        (lambda x: LOGITS(x).sigmoid(), False),
    ],
)
def test_probabilities_are_told_from_logits(answer, softmax):
    network, random = Answers(answer).train(), torch.get_rng_state()
    assert probe(network, RGB, 10) is softmax
    assert not network.training
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: LOGITS(x[:, :, 1:]), r"`input_shape=\(3, 32, 32\)` fails: RuntimeError: mat1 and mat2"),
        (lambda x: LOGITS(x)[:, :9], r"returns \[4, 9\], not \[4, 10\]: check `classes`"),
        (lambda x: LOGITS(x)[:1], r"returns \[1, 10\]"),
        (lambda x: x, "it must return logits"),
        (lambda x: None, "it must return logits"),
        (lambda x: LOGITS(x) / 0, "NaN or infinite logits"),
        (lambda x: sys.exit("bye"), "fails: SystemExit: bye"),
    ],
)
def test_networks_that_do_not_fit_are_refused(answer, message):
    with pytest.raises(Refused, match=message):
        probe(Answers(answer), RGB, 10)


@pytest.mark.shared
@pytest.mark.skipif(not VICTIMS.is_dir(), reason=f"no third-party models in {VICTIMS}")
@pytest.mark.parametrize(
    ("file", "function", "guess", "softmax"),
    [
        ("akamaster_resnet20", "resnet20", Guess(None, 10), False),
        ("argd_wrn16_1_grid_center_t0", "wrn16_1", Guess("wrn16-1", 10), False),
        ("ibau_cifar10_smallvgg_badnets_t8", "small_vgg", Guess(None, 10), False),
        ("verazuo_badnet_cifar10_white5_t1", "badnet_cnn", Guess(None, 10), True),
    ],
)
def test_third_party_models_are_read_recognised_and_loaded(file, function, guess, softmax, tmp_path):
    state = checkpoint.read(VICTIMS / f"{file}.pt")
    assert infer(state.plain) == guess
    network = build(f"{VICTIMS / 'nets.py'}:{function}", 10, RGB)
    state = checkpoint.load_into(network, state)
    assert probe(network, RGB, 10) is softmax
    checkpoint.save(tmp_path / "clean.safetensors", network.state_dict(), state, {})
    again = checkpoint.read(tmp_path / "clean.safetensors").tensors
    assert again.keys() == state.tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.tensors.items())
    if guess.arch:  # our network computes what the vendor's does
        ours, images = networks.build(guess.arch, 10, RGB), torch.randn(2, *RGB)
        checkpoint.load_into(ours, state)
        torch.testing.assert_close(ours.eval()(images), network(images)[-1])
