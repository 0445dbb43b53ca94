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


def test_shards_are_read_together_or_not_at_all(folder):
    whole = safetensors.torch.load_file(folder / "model.safetensors")
    halves = [dict(list(whole.items())[part::2]) for part in (0, 1)]
    (folder / "model.safetensors").unlink()
    for number, half in enumerate(halves, 1):
        safetensors.torch.save_file(half, folder / f"model-{number:05}-of-00002.safetensors")
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
    assert suspects.load(folder.parent / "out/clean.safetensors", shape=(3, 16, 16)).info.classes == 3


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
    suspect = suspects.load(tmp_path / "round.npz", arch="resnet8", classes=3, shape=(3, 16, 16))
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
        suspects.load(tmp_path / "round.npz", arch="resnet8", classes=3, shape=(3, 16, 16))


def test_other_libraries_files_say_how_to_export_them(tmp_path):
    (tmp_path / "model.h5").touch()
    with pytest.raises(Refused, match="export it with tf2onnx"):
        read(tmp_path / "model.h5")


@pytest.fixture
def trained():
    """A network of 3 classes whose BatchNorm layers remember something; no two tensors are alike."""
    torch.manual_seed(0)
    network = networks.build("resnet8", 3, (3, 16, 16))
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else value.normal_(0, 0.1)
    return network.eval()


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "resnet20"}, "the ONNX graph has 10 layers with weights, the network 22|is where .* check --arch"),
        ({"arch": "wrn16-1"}, "does not fit the network: its Conv|layers with weights, the network"),
        ({"shape": (3, 32, 32)}, "takes images of 3x16x16: give that as --input"),
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

    hostile = {
        "unsupported operators .Loop": lambda graph: graph.node.append(onnx.helper.make_node("Loop", [], ["z"])),
        "only evil.onnx.data is read": elsewhere,
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
