"""Messages name options as whoever reads them gives them: flags on the command line, parameters in Python."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import saved, small_state, tiny

import dhbe
from dhbe import api, cli, data, networks, settings
from dhbe.attacks import ALL as ATTACKS
from dhbe.attacks import BadNets
from dhbe.cli.erase import parser as erase_parser
from dhbe.defenses import PEERS, PRESETS
from dhbe.flags import in_python
from dhbe.search.survey import Survey
from dhbe.training import Fit

ROOT = Path(dhbe.__file__).parent
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")


def literals():
    """Every text with a flag outside the command line's own modules, each with its place; docstrings are no messages."""
    for path in sorted(ROOT.rglob("*.py")):
        if {"cli", "bench"} & set(path.relative_to(ROOT).parts):
            continue
        tree = ast.parse(path.read_text())
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
                words = node.value
                if path.name not in ("machine.py", "flags.py", "charts.py") and FLAG.search(words):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", words


def flags():
    """All options of all verbs."""
    found = []
    for verb in cli.VERBS:
        module = import_module(f"dhbe.cli.{verb}")
        found += [module.parser()] if hasattr(module, "parser") else module.parsers().values()
    found += [erase_parser(["--preset", preset]) for preset in PRESETS]
    return {option for each in found for option in each._option_string_actions}


def parameters():
    """All parameters of public functions, fields of what is handed to them, and hyperparameters."""
    functions = (dhbe.erase, dhbe.defend, dhbe.scan, dhbe.verify, dhbe.score, dhbe.attack, dhbe.load_suspect, data.load)
    names = {name for each in functions for name in inspect.signature(each).parameters}
    names |= {name for kind in (api.Options, api.Searching, dhbe.Evidence) for name in kind.__annotations__}
    kinds = [Survey, Fit, *PEERS.values(), *ATTACKS.values(), *map(type, PRESETS.values())]
    return names | {field.name for kind in kinds for field in settings.described(kind)}


def test_each_option_that_a_message_names_is_there_on_the_command_line_and_in_python():
    known, named = flags(), parameters()
    found = list(literals())
    assert len(found) > 60, "the messages were looked for in the right place"
    for place, words in found:
        assert {f"--{flag}" for flag in FLAG.findall(words)} <= known, place
        spoken = in_python(words)
        assert "--" not in spoken, place
        assert set(re.findall(r"`(\w+)", spoken)) <= named | {"model"}, place


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("lower --lr, or try another --seed.", "lower `lr`, or try another `seed`."),
        ("--pool-size 8: it must be", "`pool_size` 8: it must be"),
        ("give --mean=.5 --std=.25; --device=cuda:1.", "give `mean=.5` `std=.25`; `device='cuda:1'`."),
        ("add --arch=timm:vgg (x) or --input=1xHxW", "add `arch='timm:vgg'` (x) or `input_shape=(1, H, W)`"),
        ("a--b, x.--lr and /--lr are names", "a--b, x.--lr and /--lr are names"),
    ],
)
def test_flags_become_parameters_and_names_of_files_stay(text, spoken):
    assert in_python(text) == spoken


SHAPE = (3, 16, 16)


def network():
    built = networks.build("resnet8", 3, SHAPE)
    built.load_state_dict(small_state())
    return built.eval()


def images(side=16):
    return data.Images(torch.zeros(6, 3, side, side, dtype=torch.uint8), torch.arange(6) % 3, ("a", "b", "c"))


REFUSED = {
    "a learning rate": (lambda: dhbe.erase(network(), input_shape=SHAPE, defense=dhbe.FastDHBE(lr=-1.0)), "`lr` -1.0: it must"),
    "a pool": (
        lambda: dhbe.erase(network(), input_shape=SHAPE, defense=dhbe.FastDHBE(survey=Survey(pool_size=8))), "`pool_size` 8: it must",
    ),
    "a folder in use": (lambda: dhbe.erase(network(), input_shape=SHAPE, out="taken"), "choose another `out`"),
    "constants": (lambda: dhbe.scan(network(), input_shape=SHAPE, mean="cifar"), "`mean='cifar'`: give numbers"),
    "both constants": (lambda: dhbe.scan(network(), input_shape=SHAPE, mean="auto", std=0.5), "`mean='auto'` determines both"),
    "a device": (lambda: dhbe.scan(network(), input_shape=SHAPE, device="cuda:77"), "give `device='cpu'`"),
    "a shape": (lambda: dhbe.score(network(), dhbe.Evidence(images(8)), input_shape=SHAPE), "other data or `input_shape`"),
    "half a trigger": (lambda: dhbe.score(network(), dhbe.Evidence(images(), target=1), input_shape=SHAPE), "both `trigger` and `target`"),
    "nothing to tune": (
        lambda: dhbe.attack(BadNets(), images(), images(), arch="resnet8", out="victim", fine_tune=True), "give `clean`",
    ),
    "an architecture": (lambda: dhbe.load_suspect("odd.pt"), "add `arch`"),
    "classes of a head": (lambda: dhbe.load_suspect("model.pt", arch="resnet8", classes=4), "give `classes=3`"),
    "a size": (lambda: dhbe.verify(network(), network(), input_shape=SHAPE, survey=Survey(warm_up=0)), "`warm_up` 0: it must"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_caller_in_python_is_told_parameters(case, here):
    (here / "taken").mkdir()
    (here / "taken" / "record.json").write_text("{}")
    (here / "odd.pt").write_bytes(saved({"a.weight": torch.zeros(2, 2)}))
    call, message = REFUSED[case]
    with pytest.raises(dhbe.Refused) as refused:
        call()
    assert message in str(refused.value)
    assert "--" not in str(refused.value)


@pytest.mark.parametrize("command", [None, "dhbe erase model.pt"])
def test_a_record_speaks_as_its_run_was_started(command):
    erasure = dhbe.erase(network(), input_shape=SHAPE, defense=tiny(dhbe.FastDHBE()), command=command)
    assert erasure.record.doubt, "a network of noise is no usable input"
    for told in (erasure.record.doubt, "; ".join(erasure.record.warnings), repr(erasure), erasure._repr_html_()):
        assert ("--mean" in told, "`mean" in told) == (bool(command), not command)
