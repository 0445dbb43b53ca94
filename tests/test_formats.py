"""Folders of hubs, arrays without names: read right, given back in their form, and nothing in them trusted."""

import json
import os
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, small_state
from safetensors import safe_open

from dhbe import checkpoint, networks, suspects
from dhbe.errors import Refused
from dhbe.formats import described, read
from dhbe.networks.external import import_torchvision

CONFIG = {
    "model_type": "resnet", "num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
    "layer_type": "basic", "id2label": {"0": "cat", "1": "dog", "2": "emu"},
}  # fmt: skip
PROCESSOR = {"size": {"height": 20, "width": 16}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("transformers")
    import_torchvision()
    import transformers

    return transformers


@pytest.fixture
def folder(transformers, tmp_path):
    """A tiny ResNet as transformers writes it."""
    torch.manual_seed(0)
    kept = {key: value for key, value in CONFIG.items() if key != "id2label"}
    config = transformers.ResNetConfig(**kept, id2label={int(k): v for k, v in CONFIG["id2label"].items()})
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return tmp_path / "hf"


@pytest.mark.parametrize("named", ["", "model.safetensors"])
def test_a_folder_tells_network_size_normalisation_and_classes(folder, named, transformers):
    suspect = suspects.load(folder / named)
    assert (suspect.info.arch, suspect.info.classes, suspect.info.names) == (
        "transformers:resnet",
        3,
        ("cat", "dog", "emu"),
    )
    assert (suspect.info.input, suspect.info.mean, suspect.info.std) == ((3, 20, 16), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert any("as in preprocessor_config.json" in note for note in suspect.warnings)
    pixels = torch.rand(4, 3, 20, 16)
    theirs = transformers.ResNetForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(suspect.classifier(pixels), theirs(suspect.classifier.normalise(pixels)).logits)


def halved(folder, name="model-{:05}-of-00002.safetensors", save=safetensors.torch.save_file):
    """The same folder with its weights in two shards; what the one file held."""
    whole = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        save(dict(list(whole.items())[number - 1 :: 2]), folder / name.format(number))
    return whole


def test_shards_are_read_together_or_not_at_all(folder):
    whole = halved(folder)
    assert read(folder).tensors.keys() == whole.keys()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(Refused, match="1 of 2 shards"):
        read(folder)


def test_a_cleaned_folder_is_read_by_the_library_that_wrote_it(folder, dhbe, monkeypatch, transformers):
    monkeypatch.chdir(folder.parent)
    code, _, err = dhbe(f"erase hf --input 3x16x16 {TINY} --lr .1 --out out --quiet")
    assert code == 0, err
    theirs = transformers.ResNetForImageClassification.from_pretrained("out").state_dict()
    given = safetensors.torch.load_file("hf/model.safetensors")
    cleaned = safetensors.torch.load_file("out/model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in cleaned.items()} == {k: (v.shape, v.dtype) for k, v in given.items()}
    assert all(torch.equal(cleaned[key], theirs[key]) for key in given)
    assert any(not torch.equal(cleaned[key], given[key]) for key in given)
    with safe_open("out/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert suspects.load(folder.parent / "out/clean.safetensors", input_shape=(3, 16, 16)).info.classes == 3


SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickles"])
def test_shards_come_back_as_shards(pickled, folder, dhbe, monkeypatch, transformers):
    monkeypatch.chdir(folder.parent)
    given = halved(folder, "pytorch_model-{:05}-of-00002.bin", torch.save) if pickled else halved(folder)
    (folder.parent / "out").mkdir()
    stale = folder.parent / "out/model.safetensors"  # libraries would take it before shards
    safetensors.torch.save_file(given, stale)
    code, _, err = dhbe(f"erase hf --input 3x16x16 {TINY} --lr .1 --out out --overwrite --quiet")
    assert code == 0, err
    assert not stale.exists()
    shards = [safetensors.torch.load_file(folder.parent / "out" / name) for name in SHARDS]
    assert [set(shard) for shard in shards] == [set(list(given)[part::2]) for part in (0, 1)]
    index = json.loads((folder.parent / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name, shard in zip(SHARDS, shards, strict=True) for key in shard}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in given.values())
    theirs = transformers.ResNetForImageClassification.from_pretrained("out").state_dict()
    cleaned = shards[0] | shards[1]
    assert all(torch.equal(cleaned[key], theirs[key]) for key in given)
    assert any(not torch.equal(cleaned[key], given[key]) for key in given)
    assert suspects.load(folder.parent / "out", input_shape=(3, 16, 16)).info.classes == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_sizes": [8, 2**30]}, "implausibly large"),
        ({"depths": [10**9, 1]}, "depths .* is implausibly large"),
        ({"hidden_sizes": [8, 2**16]}, "describes a network with .* parameters, but the weights have at most"),
        ({"backbone": "someone/else"}, "names another model, which is not downloaded"),
        ({"model_type": "theirs", "auto_map": {"AutoConfig": "evil.Config"}}, "code of a folder is not run"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_sizes": "many"}, "building resnet of transformers fails"),
    ],
)
def test_configurations_can_ask_for_nothing_but_a_network(folder, changed, message):
    (folder / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('canary').touch()")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(Refused, match=message):
        suspects.load(folder)
    assert not (folder / "canary").exists()


def test_a_folder_of_timm_is_built_by_its_configuration(tmp_path):
    network = networks.build("timm:resnet10t", 4, (3, 32, 32))
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    fed = {"input_size": [3, 40, 40], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    config = {"architecture": "resnet10t", "num_classes": 4, "label_names": list("abcd"), "pretrained_cfg": fed}
    (tmp_path / "config.json").write_text(json.dumps(config))
    suspect = suspects.load(tmp_path)
    assert suspect.info.arch == "timm:resnet10t"
    assert (suspect.info.input, suspect.info.mean, suspect.info.names) == ((3, 40, 40), (0.5,) * 3, tuple("abcd"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "vit_large_patch16_224"}))
    with pytest.raises(Refused, match="describes a network with"):
        suspects.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": {"checkpoint_path": "/etc/passwd"}}))
    with pytest.raises(Refused, match="model_args must be numbers"):
        described(tmp_path)


def test_a_pickle_in_a_folder_is_read_by_the_restricted_loader(tmp_path):
    class Touches:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    torch.save(Touches(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(Refused, match="nothing was run"):
        suspects.load(tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("counters", [True, False])
def test_arrays_without_names_are_taken_in_the_order_of_the_network(tmp_path, counters):
    state = {key: value for key, value in small_state().items() if counters or "num_batches" not in key}
    np.savez(tmp_path / "round.npz", *(value.numpy() for value in state.values()))
    suspect = suspects.load(tmp_path / "round.npz", arch="resnet8", classes=3, input_shape=(3, 16, 16))
    assert all(torch.equal(suspect.classifier.network.state_dict()[key], value) for key, value in state.items())
    network = suspect.classifier.network
    made = suspect.state.container.content(network, checkpoint.changed(network.state_dict(), suspect.state))
    (tmp_path / "clean.npz").write_bytes(made["clean.npz"])
    with np.load(tmp_path / "clean.npz") as arrays:
        assert [arrays[f"arr_{number}"].shape for number in range(len(state))] == [
            tuple(v.shape) for v in state.values()
        ]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, "does not hold the weights of a network as arr_0"),
        ({"arr_0": np.array([object()])}, "could run code"),
        ({"arr_0": np.full(3, np.nan)}, "not hold plain, finite numbers"),
        ({"arr_0": np.zeros(3, complex)}, "not hold plain, finite numbers"),
        ({"arr_0": np.zeros(3)}, "holds 1 arrays without names, the network has"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "round.npz", **arrays)
    with pytest.raises(Refused, match=message):
        suspects.load(tmp_path / "round.npz", arch="resnet8", classes=3, input_shape=(3, 16, 16))


def test_other_libraries_files_say_how_to_export_them(tmp_path):
    (tmp_path / "model.h5").touch()
    with pytest.raises(Refused, match="export it with tf2onnx"):
        read(tmp_path / "model.h5")


def remembering(arch):
    """A network of 3 classes whose BatchNorm layers remember something; no two tensors are alike."""
    torch.manual_seed(0)
    network = networks.build(arch, 3, (3, 16, 16))
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else value.normal_(0, 0.1)
    return network.eval()


@pytest.fixture
def trained():
    return remembering("resnet8")


def exported(network, path, **options):
    pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (torch.zeros(1, 3, 16, 16),), path, dynamo=False, **options)
        return path


PRESERVED = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}


@pytest.mark.parametrize("options", [{}, PRESERVED], ids=["folded", "as it is"])
def test_an_onnx_file_is_matched_by_graph_order_and_compared(tmp_path, trained, options):
    file = exported(trained, tmp_path / "model.onnx", **options)
    suspect = suspects.load(file, arch="resnet8", classes=3)
    assert suspect.info.input == (3, 16, 16)
    assert any("BatchNorm is folded" in note for note in suspect.warnings) is not bool(options)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(suspect.classifier.network(images), trained(images), rtol=1e-3, atol=1e-3)
    network = suspect.classifier.network
    with torch.no_grad():
        network.fc.bias.add_(1)
    tensors = checkpoint.changed(network.state_dict(), suspect.state)
    (tmp_path / "clean.onnx").write_bytes(suspect.state.container.content(network, tensors)["clean.onnx"])
    again = suspects.load(tmp_path / "clean.onnx", arch="resnet8", classes=3).classifier.network
    with torch.no_grad():
        torch.testing.assert_close(again(images), trained(images) + 1, rtol=1e-3, atol=1e-3)


def test_batchnorm_that_was_folded_in_part_is_taken_out_there_alone(tmp_path):
    network = remembering("wrn16-1")  # BatchNorm stands before some convolutions, behind others
    suspect = suspects.load(exported(network, tmp_path / "model.onnx"), arch="wrn16-1", classes=3)
    note = next(note for note in suspect.warnings if "BatchNorm is folded" in note)
    assert "(6)" in note
    assert "training=torch.onnx.TrainingMode.PRESERVE and do_constant_folding=False" in note
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in suspect.classifier.network.modules()) == 7
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(suspect.classifier.network(images), network(images), rtol=1e-3, atol=1e-3)


def test_batchnorm_that_was_folded_everywhere_contradicts_nothing(tmp_path, trained):
    file = exported(trained, tmp_path / "model.onnx")
    suspect = suspects.load(file, arch="resnet8", classes=3)
    assert suspect.contradiction is None
    with pytest.raises(Refused, match="`mean='auto'` needs a network with BatchNorm layers"):
        suspects.load(file, arch="resnet8", classes=3, mean="auto")


HEADS = (
    "from torch import nn\n"
    "class Net(nn.Module):\n"
    "    def __init__(self, classes):\n"
    "        super().__init__()\n"
    "        self.conv, self.mix, self.fc = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 8), nn.Linear(8, classes)\n"
    "        self.plain = nn.Linear(8, 8, bias=False)\n"
    "    def forward(self, x):\n"
    "        tokens = self.conv(x).relu().flatten(2).transpose(1, 2)\n"
    "        return self.fc(self.plain(self.mix(tokens).relu()).mean(1))\n"
)


@pytest.mark.parametrize("gemm", [True, False], ids=["as exported", "Gemm without transB"])
def test_linear_layers_that_lie_the_other_way_round_are_turned_and_turned_back(tmp_path, gemm):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "v.py").write_text(HEADS)
    arch = f"{tmp_path}/v.py:Net"
    torch.manual_seed(0)
    network = networks.build(arch, 3, (3, 16, 16)).eval()
    file = exported(network, tmp_path / "model.onnx")
    model = onnx.load(file)
    assert [node.op_type for node in model.graph.node].count("MatMul") == 2, "torch exports layers of tokens so"
    if not gemm:
        (head,) = (node for node in model.graph.node if node.op_type == "Gemm")
        head.attribute.remove(next(each for each in head.attribute if each.name == "transB"))
        (weight,) = (each for each in model.graph.initializer if each.name == head.input[1])
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).T, weight.name))
        onnx.save(model, file)
    suspect = suspects.load(file, arch=arch, classes=3)
    assert any("stored as [inputs, outputs]" in note for note in suspect.warnings)
    assert all(torch.equal(suspect.classifier.network.state_dict()[k], v) for k, v in network.state_dict().items())
    ours = suspect.classifier.network
    with torch.no_grad():
        ours.mix.weight.add_(torch.randn(8, 8))
        ours.fc.weight.add_(torch.randn(3, 8))
    (tmp_path / "clean.onnx").write_bytes(
        suspect.state.container.content(ours, checkpoint.changed(ours.state_dict(), suspect.state))["clean.onnx"]
    )
    again = suspects.load(tmp_path / "clean.onnx", arch=arch, classes=3).classifier.network
    assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "resnet20"}, "the ONNX graph has 10 layers with weights, the network 22|is where .* check `arch`"),
        ({"arch": "wrn16-1"}, "does not fit the network: its Conv|layers with weights, the network"),
        ({"input_shape": (3, 32, 32)}, "takes images of 3x16x16: give that as `input_shape`"),
    ],
)
def test_an_onnx_file_that_does_not_fit_is_refused(tmp_path, trained, options, message):
    file = exported(trained, tmp_path / "model.onnx")
    with pytest.raises(Refused, match=message):
        suspects.load(file, **{"arch": "resnet8", "classes": 3} | options)


def test_an_onnx_graph_that_computes_something_else_is_refused(tmp_path, trained):
    file = exported(trained, tmp_path / "model.onnx")
    (tmp_path / "v.py").write_text(
        "from dhbe.networks.resnet import ResNet\nclass Net(ResNet):\n"
        "    def forward(self, x):\n        return super().forward(x.flip(1))\n"
        "net = lambda classes: Net((1, 1, 1), 16, classes)\n"
    )
    with pytest.raises(Refused, match="compute different outputs"):
        suspects.load(file, arch=f"{tmp_path}/v.py:net", classes=3)


def test_onnx_graphs_run_nothing_but_plain_layers_and_read_no_other_file(tmp_path, trained):
    onnx = pytest.importorskip("onnx")
    whole = onnx.load(exported(trained, tmp_path / "model.onnx"))

    def changed(change):
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        change(model.graph)
        (tmp_path / "evil.onnx").write_bytes(model.SerializeToString())
        return tmp_path / "evil.onnx"

    def elsewhere(graph):
        each = graph.initializer[0]
        each.ClearField("raw_data")
        each.data_location = each.EXTERNAL
        each.external_data.add(key="location", value="/etc/passwd")

    def growing(graph):
        name = graph.node[0].output[0]
        for step in range(40):
            graph.node.append(onnx.helper.make_node("Concat", [name, name], [f"more{step}"], axis=1))
            name = f"more{step}"

    def crippled(graph):
        graph.node.append(onnx.helper.make_node("Add", [], ["z"]))
        next(node for node in graph.node if node.op_type == "Gemm").ClearField("input")

    hostile = {
        "weights of the ONNX graph are computed|inferring the sizes": crippled,
        "unsupported operators .Loop": lambda graph: graph.node.append(onnx.helper.make_node("Loop", [], ["z"])),
        "only evil.onnx.data is supported": elsewhere,
        "too large": growing,
    }
    for message, change in hostile.items():
        with pytest.raises(Refused, match=message):
            read(changed(change))
    (tmp_path / "evil.onnx").write_bytes(b"noise")
    with pytest.raises(Refused, match="broken or not an ONNX file"):
        read(tmp_path / "evil.onnx")


def test_a_cleaned_model_is_written_as_onnx_too(here, dhbe):
    onnxruntime = pytest.importorskip("onnxruntime")
    code, _, err = dhbe(f"erase model.pt --input 3x16x16 {TINY} --out out --also onnx --quiet")
    assert code == 0, err
    session = onnxruntime.InferenceSession("out/clean.onnx")
    images = torch.randn(5, 3, 16, 16)
    network = suspects.load(here / "out/clean.safetensors").classifier.network
    with torch.no_grad():
        ours = network(images).numpy()
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], ours, rtol=1e-3, atol=1e-3)
