"""Matches a checkpoint's tensors to a network's, despite names changed by wrappers and library versions."""

import copy
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dhbe import foreign
from dhbe.candidates import AVERAGED
from dhbe.errors import Refused
from dhbe.networks.external import SINGLE, guarded

COUNTER = "num_batches_tracked"
"""Name of BatchNorm's counter, which does not affect the output."""

HIDDEN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
"""Parts of names inserted by wrappers: torch.compile, FSDP, activation checkpointing, DataParallel."""

STATISTICS = ("running_mean", "running_var")

TABLES = {"attn_mask", "relative_position_index", "relative_coords_table", "position_ids", "total_ops", "total_params"}
"""Buffers that a network computes itself, or that tools leave behind."""

AUXILIARY = re.compile(r"(^|\.)(aux|auxlogits|auxiliary)\w*\.", re.IGNORECASE)
"""Auxiliary heads, which serve training and do not affect the output."""

SYNONYMS = {"linear": "fc", "shortcut": "downsample"}
"""Parts of names in a widespread family of residual networks for small images, and the same parts in torchvision's."""

MEANS = {"mean": "std", "new_mean": "new_std", "pixel_mean": "pixel_std", "image_mean": "image_std", "mu": "sigma"}
"""Last parts of the names of a mean and a standard deviation by which some networks normalise their input."""

ASIDE = re.compile(r"^(criterion|loss|loss_fn|n_averaged|metrics?|\w+_metrics?|\w+_(acc|accuracy))(\.|$)")
"""Names of training state in the same state dict as the network."""

PARTLY = {
    "_mask": "it is pruned, with masks beside the weights: make that permanent (torch.nn.utils.prune.remove), and save it again",
    "lora_": "it holds a LoRA adapter, not the network: merge both (merge_and_unload), and save the result",
    "flat_param": "its parameters are flattened by FSDP: save a full state dict (StateDictType.FULL_STATE_DICT)",
}
"""What is wrong with weights that have such names and that the network lacks."""

SPLIT = re.compile(r"parametrizations\.(\w+)\.original([01])$")
DENSE = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")

DEEPEST = 8
"""Maximum number of a name's leading parts that may come from wrappers."""


@dataclass(frozen=True)
class Match:
    """The result of matching."""

    names: dict[str, str]
    """The network's name of each tensor by the file's; tensors that the network does not need are missing."""
    notes: tuple[str, ...] = ()


def canonical(key: str) -> str:
    """A tensor's name without the parts of wrappers, in one spelling.

    >>> canonical("module.features._orig_mod.denseblock1.denselayer2.norm.1.weight")
    'features.denseblock1.denselayer2.norm1.weight'
    >>> canonical("fc.parametrizations.weight.original0")
    'fc.weight_g'
    """
    key = ".".join(part for part in key.split(".") if part not in HIDDEN)
    key = SPLIT.sub(lambda found: f"{found[1]}_{'gv'[int(found[2])]}", key)
    return DENSE.sub(r"\1\2.", key)


def common(key: str) -> str:
    """The canonical name, with parts that families of networks name differently in one spelling.

    >>> common("module.layer2.0.shortcut.0.weight")
    'layer2.0.downsample.0.weight'
    """
    return ".".join(SYNONYMS.get(part, part) for part in canonical(key).split("."))


def normalisation(given: Mapping[str, Tensor]) -> tuple[str, Tensor, Tensor] | None:
    """A mean and a standard deviation of pixels in [0, 1] among a file's tensors, with the first one's name; else None."""
    for key, mean in given.items():
        place, dot, last = key.rpartition(".")
        std = given.get(f"{place}{dot}{MEANS[last]}") if last in MEANS else None
        if std is not None and mean.numel() == std.numel() and mean.numel() in (1, 3) and float(std.min()) > 0:
            unit = 255 if float(max(mean.max(), std.max())) > 1 else 1
            return key, mean.flatten().float() / unit, std.flatten().float() / unit
    return None


def match(network: nn.Module, given: Mapping[str, Tensor], weights: str | None = None) -> Match:
    """Finds the network's names for the tensors of a checkpoint.

    Args:
        network: The network, untrained.
        given: The checkpoint's tensors by name.
        weights: Prefix of the wanted tensors' names, if the checkpoint holds several networks side by side.

    Raises:
        Refused: The tensors do not fit the network, or several sets of them do.
    """
    wanted = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    ours, theirs = _by_canonical(wanted), _by_canonical(given)
    cuts, put, note = _prefix(
        {k: given[v] for k, v in theirs.items()}, {k: wanted[v] for k, v in ours.items()}, weights
    )
    names = {
        key: ours[put + name.removeprefix(cut)]
        for cut in cuts
        for name, key in theirs.items()
        if name.startswith(cut) and put + name.removeprefix(cut) in ours
    }
    notes = [note] if note else []
    if missing := _missing(network, wanted, names):
        names |= _elsewhere(given, wanted, missing, names, notes)
    if _missing(network, wanted, names):
        names |= _renamed_by_hooks(network, given, names, cuts[-1])
    _judge(network, given, wanted, names, cuts, notes)
    return Match(names, tuple(notes))


def in_order(network: nn.Module, given: Mapping[str, Tensor]) -> Match:
    """Matches tensors without names in the order of the network's state dict, with or without batch counters.

    Raises:
        Refused: Their number or shapes differ.
    """
    wanted = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    for keys in (list(wanted), [key for key in wanted if not key.endswith(COUNTER)]):
        shapes = [(_shape(tensor), _shape(wanted[key])) for tensor, key in zip(given.values(), keys, strict=False)]
        if len(keys) == len(given) and all(a == b for a, b in shapes):
            return Match(dict(zip(given, keys, strict=True)))
    parameters = sum(1 for _ in network.parameters())
    why = "the BatchNorm statistics are missing" if len(given) == parameters else "check --arch and --classes"
    raise Refused(
        f"the file holds {len(given)} arrays without names, the network has {len(wanted)} tensors, and in this order their "
        f"shapes differ: {why}"
    )


def majority_prefix(keys: Collection[str], known: Sequence[str]) -> str:
    """The prefix that wrappers add to most keys."""
    prefix, kept = "", list(keys)
    while kept:
        step, inside = max(
            ((name, [key for key in kept if key.startswith(prefix + name)]) for name in known),
            key=lambda option: len(option[1]),
        )
        if len(inside) < max(1, 0.8 * len(kept)):
            break
        prefix, kept = prefix + step, inside
    return prefix


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape) or (1,)  # a counter may be a scalar or an array of one


def _by_canonical(keys: Iterable[str]) -> dict[str, str]:
    """Names by their canonical form; names with the same form are kept as they are."""
    forms = {key: common(key) for key in keys}
    often = Counter(forms.values())
    return {form if often[form] == 1 else key: key for key, form in forms.items()}


def _prefix(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], weights: str | None
) -> tuple[tuple[str, ...], str, str]:
    """The prefixes to remove from the file's names, the prefix to add to get the network's, and a note.

    Under several prefixes lie states of the same network: the last is the one to read, all are to be written.
    """
    votes: Counter[tuple[str, str]] = Counter({("", ""): 0})
    for name, tensor in given.items():
        for cut, rest in _suffixes(name):
            if rest in wanted:
                votes[cut, ""] += 1 + (tensor.shape == wanted[rest].shape)
    for name, tensor in wanted.items():
        for put, rest in _suffixes(name):
            if put and rest in given:
                votes["", put] += 1 + (tensor.shape == given[rest].shape)
    every = votes
    if weights is not None:
        votes = Counter({pair: count for pair, count in votes.items() if f".{weights}." in f".{pair[0]}"})
        if not votes:
            raise Refused(f"no tensors of the checkpoint fit the network under {weights!r}: check --weights")
    rivals = _rivals(votes, wanted)
    if len(rivals) > 1:
        return _of_rivals(rivals, given, wanted)
    cut, put = max(votes, key=lambda pair: (votes[pair], len(pair[0])))
    others = [other for other in _rivals(every, wanted) if other != cut]
    mine = _state(cut, given, wanted)
    also = [  # of the same training, or the same again: written too
        other for other in others
        if _averaged(other) != _averaged(cut) or all(map(_same, _state(other, given, wanted), mine))
    ]  # fmt: skip
    return (*also, cut), put, _unwritten([other for other in others if other not in also])


def _rivals(votes: Counter[tuple[str, str]], wanted: Mapping[str, Tensor]) -> list[str]:
    """The prefixes under which lie states of the network."""
    best = max(votes.values())
    return [cut for (cut, put), count in votes.items() if count >= max(0.9 * best, len(wanted)) and not put]


def _averaged(cut: str) -> bool:
    return bool(AVERAGED.search(cut.lower()))


def _unwritten(cuts: Sequence[str]) -> str:
    if not cuts:
        return ""
    return (
        f"the file holds other networks that fit ({', '.join(show(cut.rstrip('.')) for cut in cuts)}): they are not cleaned, and "
        "what is written holds them as they were"
    )


def _of_rivals(
    cuts: Sequence[str], given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], str, str]:
    """Chooses one of several networks in a state dict: the same one again, or the average, if one of two is the average."""
    states = [_state(cut, given, wanted) for cut in cuts]
    if all(len(each) == len(states[0]) and all(map(_same, each, states[0])) for each in states):
        return tuple(cuts), "", ""
    averages = [cut for cut in cuts if _averaged(cut)]
    offered = ", ".join(show(cut.rstrip(".")) for cut in cuts)
    if len(cuts) > 2 or len(averages) != 1:
        raise Refused(f"the checkpoint holds several networks that fit: add --weights with one of {offered}")
    note = f"the file holds weights and their average ({offered}): using {averages[0].rstrip('.')}; --weights selects another"
    return (*(cut for cut in cuts if cut != averages[0]), averages[0]), "", note


def _state(cut: str, given: Mapping[str, Tensor], wanted: Iterable[str]) -> list[Tensor]:
    return [given[cut + name] for name in wanted if cut + name in given]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _suffixes(name: str) -> Iterable[tuple[str, str]]:
    parts = name.split(".", DEEPEST)
    for count in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:count]), ".".join(parts[count:])


def _missing(network: nn.Module, wanted: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
    """Tensors that the network needs and the file lacks."""
    found, buffers = set(names.values()), {name for name, _ in network.named_buffers()}
    return [
        key for key in wanted
        if key not in found and not key.endswith(COUNTER) and not AUXILIARY.search(key)
        and (key not in buffers or key.endswith(STATISTICS))
    ]  # fmt: skip


def _elsewhere(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    missing: Sequence[str],
    names: Mapping[str, str],
    notes: list[str],
) -> dict[str, str]:
    """Missing tensors, usually the last layer's, that lie together under a prefix of their own; else nothing."""
    found: dict[str, str] = {}
    for name in missing:
        ends = [key for key in given if key not in names and f".{common(key)}".endswith(f".{common(name)}")]
        if len(ends) != 1 or given[ends[0]].shape != wanted[name].shape:
            return {}
        found[ends[0]] = name
    places = {common(key).removesuffix(common(name)) for key, name in found.items()}
    beside = [key for key in given if any(place and common(key).startswith(place) for place in places)]
    if not all(key in found or _needless(canonical(key), given[key]) for key in beside):
        return {}  # another network of its own
    notes.append(f"the network lies in several places; taken from {some(map(show, found))} too")
    return found


def _renamed_by_hooks(
    network: nn.Module, given: Mapping[str, Tensor], names: Mapping[str, str], cut: str
) -> dict[str, str]:
    """Names changed by the network's own loading hooks, found by loading every tensor filled with its number."""
    trial = copy.deepcopy(network)
    keys = [key for key in given if common(key).startswith(cut)]
    numbered = {
        names.get(key, canonical(key).removeprefix(cut)): torch.full_like(given[key], 1 + number, dtype=torch.float64)
        for number, key in enumerate(keys)
    }
    try:
        with guarded("loading the weights into the network"):
            trial.load_state_dict(numbered, strict=False)
    except Refused as refusal:
        if "size mismatch" in str(refusal):
            return {}
        raise
    found = {}
    for name, value in trial.state_dict().items():
        if isinstance(value, Tensor) and value.numel() and name not in names.values() and (value == value.max()).all():
            number = float(value.max()) - 1
            if number in range(len(keys)) and given[keys[int(number)]].shape == value.shape:
                found.setdefault(keys[int(number)], name)
    return {key: name for key, name in found.items() if key not in names}


def _judge(
    network: nn.Module,
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    names: Mapping[str, str],
    cuts: tuple[str, ...],
    notes: list[str],
) -> None:
    """Refuses tensors that do not fit, and notes those that are left over."""
    missing = _missing(network, wanted, names)
    misshapen = [key for key, name in names.items() if given[key].shape != wanted[name].shape]
    misshapen = [key for key in misshapen if not key.endswith(COUNTER) and not AUXILIARY.search(names[key])]
    left = [key for key in given if key not in names]
    strange = [key for key in left if common(key).startswith(cuts) and not _needless(canonical(key), given[key])]
    if missing or misshapen or strange:
        raise Refused(_misfit(given, wanted, names, (missing, strange, misshapen)))
    heads = sorted({name.split(".")[0] for name in wanted if AUXILIARY.search(name) and name not in names.values()})
    if heads:
        notes.append(f"the file lacks {some(heads)}: auxiliary heads do not affect the output")
    aside = [key for key in left if not key.endswith(COUNTER)]
    if aside:
        notes.append(f"not used by the network, and copied unchanged: {some(map(show, aside))}")


def _needless(name: str, tensor: Tensor) -> bool:
    """Whether a tensor that the network lacks cannot affect the output."""
    last = name.rpartition(".")[2]
    return (
        not tensor.is_floating_point() or last in TABLES
        or (tensor.numel() in (1, 3) and last in {*MEANS, *MEANS.values()})
        or bool(AUXILIARY.search(name) or ASIDE.match(name))
    )  # fmt: skip


def _misfit(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    names: Mapping[str, str],
    faults: tuple[list[str], list[str], list[str]],
) -> str:
    missing, strange, misshapen = faults
    told = {
        "missing": [f"{show(key)} {list(wanted[key].shape)}" for key in missing],
        "unexpected": [f"{show(key)} {list(given[key].shape)}" for key in strange],
        "wrong shape": [f"{show(k)} {list(given[k].shape)} for {list(wanted[names[k]].shape)}" for k in misshapen],
    }
    listing = "; ".join(f"{fault}: {some(lines, 3)}" for fault, lines in told.items() if lines)
    fitting = len(names) - len(misshapen)
    cause = _cause(given, wanted, names, faults)
    if not fitting:
        return f"the checkpoint does not fit the network, {cause} ({listing})"
    return f"the checkpoint does not fit the network: {fitting} of {len(wanted)} tensors match; {cause} ({listing})"


def _cause(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    names: Mapping[str, str],
    faults: tuple[list[str], list[str], list[str]],
) -> str:
    """The probable cause of a mismatch, and how to fix it."""
    missing, strange, misshapen = faults
    if any(not given[key].numel() and wanted[names[key]].numel() for key in misshapen):
        return "it lacks the weights, which DeepSpeed's ZeRO-3 keeps in shards: join them with its zero_to_fp32.py"
    if cause := next((cause for sign, cause in PARTLY.items() if any(sign in key for key in strange)), None):
        return cause
    if not missing and not strange and all("pos" in names[key] for key in misshapen):
        return "it is for images of another size: check --input"
    if not missing and not strange:
        pairs = [(given[key].shape, wanted[names[key]].shape) for key in misshapen]
        heads = {theirs[0] for theirs, ours in pairs if theirs[1:] == ours[1:] and len(theirs) in (1, 2)}
        if heads == {1}:
            return SINGLE
        if len(heads) == 1 and all(theirs[1:] == ours[1:] for theirs, ours in pairs):
            return f"its last layer has {min(heads)} classes: give --classes={min(heads)}"
        kernels = [(theirs, ours) for theirs, ours in pairs if len(theirs) == len(ours) == 4]
        if len(pairs) == len(kernels) == 1:
            theirs, ours = kernels[0]
            if theirs[1] != ours[1] and theirs[2:] == ours[2:]:
                return f"its first layer takes {theirs[1]} channels: give --input={theirs[1]}xHxW"
            return f"its first kernel is {theirs[2]}x{theirs[3]}, not {ours[2]}x{ours[3]}, a variant of this network: check --arch"
        return "a network with other widths: check --arch"
    bare = {canonical(key) for key in (*missing, *strange)}
    if bare and all(name.endswith((*STATISTICS, COUNTER)) for name in bare):
        return "the BatchNorm statistics are missing, which the network needs: ask for the whole state dict"
    norms = {name.rpartition(".")[0] for name in wanted if name.endswith(STATISTICS)}
    if missing and all(n.rpartition(".")[0] in norms for n in missing) and all(n.endswith(".bias") for n in strange):
        return "its BatchNorm layers seem to be folded into the convolutions: ask for the weights before that"
    if any(name.endswith(("weight_g", "weight_v")) for name in bare):
        return "only one of the two uses weight_norm: build the network like the file's, or remove weight_norm there"
    if any(AVERAGED.search(key) for key in given):
        return "an average over the parameters may lack the other tensors: try --weights, or check --arch"
    if len(missing) + len(strange) + len(misshapen) <= 4:
        return "all other tensors match, so this is a variant of the network: check --arch"
    if not missing and not misshapen:
        return "the file has layers that the network lacks: check --arch"
    if not strange and not misshapen:
        return "the network has layers that the file lacks: check --arch"
    return "the architectures differ: check --arch"


def show(text: object) -> str:
    """A name from an untrusted file, safe to print."""
    return foreign.name(text, longest=100) if isinstance(text, str) else f"<{type(text).__name__}>"


def some(names: Iterable[str], most: int = 6) -> str:
    """The first names as text, with the number of further ones."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
