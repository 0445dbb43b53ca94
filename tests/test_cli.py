"""Whole commands, from what they are told to what they leave."""

import hashlib
import json
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import ATTACK, ERASE, KNOWN, SCORE, TINY, colours, folder, listing, packed, small_state, without_notes

from dhbe import cli, networks, records
from dhbe.attacks import ALL as ATTACKS
from dhbe.defenses import PEERS

VERBS = [
    *cli.VERBS, *(f"attack {name}" for name in ATTACKS), *(f"defend {name}" for name in PEERS),
    *(f"bench {what}" for what in ("list", "run", "show", "export")),
]  # fmt: skip


def test_help_shows_examples(dhbe):
    code, out, err = dhbe("--help")
    assert (code, err) == (0, "")
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert "examples:" in out


def test_help_loads_no_torch_and_says_the_same_as_with_it(dhbe):
    """All in one process without torch, where each leaves nothing behind that would stand in torch's way."""
    source = """
import contextlib, io, json, sys
from dhbe.cli import main

def helped(verb):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main([*verb.split(), "--help"])
    loaded = [name for name in ("torch", "numpy", "pydantic", "dhbe.defenses") if name in sys.modules]
    return [code, said.getvalue(), loaded]

told = {verb: helped(verb) for verb in json.load(sys.stdin)}
import torch
from dhbe.networks import build
assert build("resnet8", 2, (3, 8, 8))(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
json.dump(told, sys.stdout)
"""
    ended = subprocess.run(
        [sys.executable, "-c", source], input=json.dumps(VERBS), capture_output=True, text=True, check=False
    )
    assert ended.stderr == ""
    for verb, (code, said, loaded) in json.loads(ended.stdout).items():
        assert (code, loaded) == (0, []), verb
        assert said == dhbe(f"{verb} --help")[1], verb


COMPLETED = {
    "dhbe era": "erase",
    "dhbe erase --precision ": "auto fp32 bf16",
    "dhbe erase --preset of": "official",
    "dhbe erase --max-a": "--max-asr",
    "dhbe erase mod": "model.pt",
    "dhbe attack badn": "badnets",
    "dhbe attack badnets --sty": "--style",
    "dhbe defend nad --teacher": "--teacher-epochs",
    "dhbe bench run --sca": "--scale",
    "dhbe erase --albu": "",  # an old name works, and is not recommended
}


def test_a_shell_completes_what_was_begun(here, dhbe):
    code, script, err = dhbe("completion bash")
    assert (code, err) == (0, "")
    (here / "model.pt").touch()
    asks = f"""{script}
        words=$(complete -p dhbe); words=${{words##*-F }}; function=${{words%% *}}
        while IFS= read -r line; do
            read -ra COMP_WORDS <<< "$line"
            case $line in *" ") COMP_WORDS+=("") ;; esac
            COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )) COMPREPLY=()
            $function dhbe && echo "${{COMPREPLY[*]}}"
        done
    """
    said = subprocess.run(
        ["bash", "-c", asks],
        input="".join(f"{line}\n" for line in COMPLETED),
        capture_output=True,
        text=True,
        check=False,
    )
    assert dict(zip(COMPLETED, said.stdout.split("\n"), strict=False)) == COMPLETED, said.stderr


def test_completion_knows_every_verb_in_every_shell_and_loads_no_torch(dhbe):
    for shell in ("bash", "zsh", "fish"):
        assert all(verb in dhbe(f"completion {shell}")[1] for verb in cli.VERBS)
    look = "import sys; from dhbe.cli import main; main(['completion', 'bash']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], stdout=subprocess.DEVNULL, check=False).returncode == 0
    code, _, err = dhbe("completion csh")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    try:
        code = cli.main([*verb.split(), "--help"])
    except SystemExit as leave:
        code = leave.code
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: dhbe {verb}")
    assert f"dhbe {verb} " in out.partition("examples:")[2] or verb in ("attack", "doctor")
    if verb.startswith("attack "):  # every setting has its line
        assert len(re.findall(r"--[a-z-]+( [A-Z_]+)?\s+[A-Za-z][a-z]", out.partition("settings of the attack")[2])) >= 3


def test_a_story(here, dhbe):
    """A backdoor is planted, found by its trigger, erased and measured again."""
    train = "--arch resnet8 --epochs 4 --batch 16 --rate .25 --lr .05 --no-flip --crop 0 --min-asr 0 --json"
    (here / "data.npz").write_bytes(packed(**colours(240)))
    code, out, err = dhbe(f"attack badnets --data data.npz --out practice {train} --quiet")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told == told | records.read(here / "practice/record.json").model_dump(mode="json")
    assert (told["record"], told["sha256"]) == ("practice/record.json", told["model"]["sha256"])
    assert sorted(listing(here / "practice")) == [
        "backdoored.safetensors", "record.json", "report.html", "trigger.json",
    ]  # fmt: skip

    planted = "--data data.npz --split test --trigger practice/trigger.json --target 2"
    code, out, err = dhbe(f"score practice/backdoored.safetensors {planted} --json --quiet")
    assert (code, without_notes(err)) == (0, [])
    before = json.loads(out)
    assert {"acc", "asr", "asr_x4", "asr_x9"} <= set(before)
    assert before["acc"] > 0.6

    erase = f"erase practice/backdoored.safetensors {TINY} --out cleaned {planted} --json --quiet"
    code, out, err = dhbe(erase)
    assert (code, without_notes(err)) == (0, [])
    record = records.read(here / "cleaned/record.json")
    told = json.loads(out)
    assert told == told | record.model_dump(mode="json", exclude={"curve"})
    assert record.command == f"dhbe {erase}"
    assert record.result == hashlib.sha256((here / "cleaned/clean.safetensors").read_bytes()).hexdigest()
    assert record.before.acc == before["acc"]
    assert record.before.asr == before["asr"]
    assert (here / "cleaned/report.html").read_text().startswith("<!DOCTYPE html>")

    code, out, err = dhbe(f"score cleaned/clean.safetensors {planted} --json")
    after = json.loads(out)
    assert code == 0
    assert after["acc"] == record.after.acc
    assert after["asr"] == record.after.asr


def test_an_attack_that_missed_leaves_nothing_unless_forced(here, dhbe):
    command = ATTACK.replace("--epochs 1", "--epochs 1 --lr 1e-9") + " --quiet"
    code, out, err = dhbe(command)
    assert (code, out) == (4, "")
    (said,) = without_notes(err)
    assert re.fullmatch("dhbe: the attack badnets failed: ASR .*, expected at least 0.95; poison more images.*", said)
    assert not (here / "out").exists()
    code, _, _ = dhbe(f"{command} --force")
    assert code == 0
    (warning,) = records.read(here / "out/record.json").warnings
    assert warning.startswith("the attack badnets failed: ASR")


def test_accuracy_is_compared_with_the_clean_model(here, dhbe):
    (here / "data.npz").write_bytes(packed(**colours(240)))
    train = "--data data.npz --arch resnet8 --batch 16 --lr .05 --no-flip --crop 0 --quiet"
    assert dhbe(f"attack none {train} --epochs 4 --out clean")[0] == 0
    assert sorted(listing(here / "clean")) == ["clean.safetensors", "record.json", "report.html"]
    planted = f"attack badnets {train} --epochs 4 --rate .1 --min-asr 0 --out out --clean clean/clean.safetensors"
    code, _, err = dhbe(f"{planted} --max-drop=-1")  # nothing is so much better than the clean model
    assert code == 4
    assert re.search(r"ACC \d\.\d+ is more than -1 below the clean model's \d\.\d+; poison fewer images", err)
    assert dhbe(f"{planted} --max-drop 1")[0] == 0
    tuned = planted.replace("--epochs 4", "--epochs 1 --lr 1e-9").replace("--out out", "--out tuned") + " --fine-tune"
    assert dhbe(f"{tuned} --max-drop .1")[0] == 0
    accuracies = [records.read(here / f"{folder}/record.json").before.acc for folder in ("clean", "tuned")]
    assert abs(accuracies[0] - accuracies[1]) < 0.1  # it began where the clean one ended


def test_all_to_all_and_one_to_one_are_measured_as_such(here, dhbe):
    (here / "data.npz").write_bytes(packed(**colours(240)))
    train = f"{ATTACK.replace('--epochs 1', '--epochs 4')} --rate .4 --lr .05 --no-flip --crop 0 --force --quiet --json"
    code, out, _ = dhbe(f"{train} --goal all-to-all")
    record = json.loads(out)
    assert (code, record["target"]) == (0, None)
    score = "score out/backdoored.safetensors --data data.npz --split test --trigger out/trigger.json --json"
    code, out, _ = dhbe(f"{score} --target next")
    scores = json.loads(out)
    assert (code, scores["asr_all"]) == (0, record["before"]["asr_all"])
    assert [rate is not None for rate in scores["acc_classes"]] == [True] * 3
    code, out, _ = dhbe(f"{score} --target 2 --source 1")
    one = json.loads(out)
    assert one["asr_n"] <= 16
    assert [rate is not None for rate in one["asr_classes"]] == [False, True, False]


def test_scores_hold_intervals_and_activation_differences(here, dhbe):
    code, out, _ = dhbe(f"{SCORE} {KNOWN} --mean cifar10 --std cifar10 --json")
    scores = json.loads(out)
    assert code == 0
    low, high = scores["acc_interval"]
    assert low < scores["acc"] < high
    assert set(scores["activations"]) == {"features_l1", "features_l2", "logits_l1", "logits_l2"}
    assert all(box == sorted(box) for box in scores["activations"].values())
    assert 0 <= scores["ra"] <= 1
    assert scores["der"] is None


def test_attacks_and_triggers_are_listed(dhbe):
    code, out, _ = dhbe("attack --help")
    assert code == 0
    for name in ("badnets", "clean-label", "trojaning", "sig", "blend", "lsb", "refool", "wanet", "none"):
        assert re.search(f"^  {name} +[a-z].*$", out, re.MULTILINE)
    for name in ("badnets", "pixel", "scattered", "faint", "blend", "sig", "lsb", "refool", "warp"):
        assert re.search(rf"^  {name}[\[:].* [A-Z].*\.$", out, re.MULTILINE)


def test_a_trigger_without_amplified_forms_gives_null(here, dhbe):
    code, out, _ = dhbe(f"{SCORE} --data data.npz --trigger badnets:9 --target 2 --json")
    scores = json.loads(out)
    assert (code, scores["asr_x4"], scores["asr_x9"]) == (0, None, None)


def test_images_of_other_sizes_are_fitted_to_the_model(here, dhbe):
    folder(a=16, b=8, c=40)(here / "d")
    code, out, err = dhbe(f"{SCORE} --data d --json --quiet")
    assert (code, without_notes(err), json.loads(out)["n"]) == (0, [], 3)


def test_gates_decide_the_exit_code(here, dhbe):
    code, out, err = dhbe(f"{ERASE} {KNOWN} --min-acc 1 --json --quiet")
    assert code == 1
    (line,) = without_notes(err)
    assert re.fullmatch(r"dhbe: gate failed: ACC 0\.\d+ is below --min-acc 1", line)
    record = json.loads(out)
    assert record["after"]["acc"] < 1
    code, _, err = dhbe(f"{ERASE} {KNOWN} --min-acc 0 --resume --quiet")
    assert (code, without_notes(err)) == (0, [])


def test_the_cleaned_file_has_the_form_of_the_given_one(here, dhbe):
    given = {f"module.{key}": x.half() if x.is_floating_point() else x for key, x in small_state().items()}
    torch.save({"epoch": 7, "state_dict": given}, here / "model.pt")
    code, _, err = dhbe(f"{ERASE} --quiet")
    assert (code, without_notes(err)) == (0, [])
    clean = safetensors.torch.load_file(here / "out/clean.safetensors")
    assert {key: (x.shape, x.dtype) for key, x in clean.items()} == {
        key: (x.shape, x.dtype) for key, x in given.items()
    }
    network = torch.nn.Module()
    network.module = networks.build("resnet8", 3, (3, 16, 16)).half()
    network.load_state_dict(clean)
    assert any(not torch.equal(clean[key], given[key]) for key in given)


def test_a_vendor_that_prints_does_not_spoil_the_output(here, dhbe):
    (here / "v.py").write_text(
        "from dhbe.networks.resnet import ResNet\n"
        "class Net(ResNet):\n"
        "    def forward(self, x):\n"
        "        print('hello')\n"
        "        return super().forward(x)\n"
        "def net(classes):\n"
        "    print('building')\n"
        "    return Net((1, 1, 1), 16, classes)\n"
    )
    for command in (f"{ERASE} {KNOWN}", f"{SCORE} --data data.npz"):
        code, out, _ = dhbe(f"{command} --arch v.py:net --json")
        assert code == 0
        assert json.loads(out)
