"""Which tensor of a checkpoint is which of the network's, whatever wrappers and versions have made of their names."""

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
from dhbe.networks.external import guarded

COUNTER = "num_batches_tracked"
"""Of BatchNorm; it has no part in what a network computes."""

HIDDEN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
"""Parts of names that wrappers put anywhere: torch.compile, FSDP, activation checkpoints, DataParallel."""

STATISTICS = ("running_mean", "running_var")

TABLES = {"attn_mask", "relative_position_index", "relative_coords_table", "position_ids", "total_ops", "total_params"}
"""Buffers that a network computes by itself, or that tools leave behind."""

AUXILIARY = re.compile(r"(^|\.)(aux|auxlogits|auxiliary)\w*\.", re.IGNORECASE)
"""Heads that help in training and have no part in the answer."""

ASIDE = re.compile(r"^(criterion|loss|loss_fn|n_averaged|metrics?|\w+_metrics?|\w+_(acc|accuracy))(\.|$)")
"""What training code keeps beside the network, in one state dict with it."""

SPLIT = re.compile(r"parametrizations\.(\w+)\.original([01])$")
DENSE = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")

DEEPEST = 8
"""Parts of a name that may be a wrapper's."""


@dataclass(frozen=True)
class Match:
    """What is what."""

    names: dict[str, str]
    """The network's name of a tensor by the file's. Tensors of the file without one are not needed."""
    notes: tuple[str, ...] = ()


def canonical(key: str) -> str:
    """A tensor's name without what wrappers hide in it, and in one spelling.

    >>> canonical("module.features._orig_mod.denseblock1.denselayer2.norm.1.weight")
    'features.denseblock1.denselayer2.norm1.weight'
    >>> canonical("fc.parametrizations.weight.original0")
    'fc.weight_g'
    """
    key = ".".join(part for part in key.split(".") if part not in HIDDEN)
    key = SPLIT.sub(lambda found: f"{found[1]}_{'gv'[int(found[2])]}", key)
    return DENSE.sub(r"\1\2.", key)


def match(network: nn.Module, given: Mapping[str, Tensor], weights: str | None = None) -> Match:
    """Finds for the tensors of a checkpoint their names in the network.

    Args:
        network: Untrained.
        given: Tensors under the names of the file.
        weights: What the names of the wanted tensors begin with, where a file holds several networks side by side.

    Raises:
        Refused: They do not fit, or several of them do.
    """
    wanted = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    ours, theirs = _by_canonical(wanted), _by_canonical(given)
    cut, put, note = _prefix({k: given[v] for k, v in theirs.items()}, {k: wanted[v] for k, v in ours.items()}, weights)
    names = {
        key: ours[put + name.removeprefix(cut)]
        for name, key in theirs.items()
        if name.startswith(cut) and put + name.removeprefix(cut) in ours
    }
    if _missing(network, wanted, names):
        names |= _renamed_by_hooks(network, given, names, cut)
    notes = [note] if note else []
    _judge(network, given, wanted, names, cut, notes)
    return Match(names, tuple(notes))


def in_order(network: nn.Module, given: Mapping[str, Tensor]) -> Match:
    """The same for tensors without names, in the order of the network's state dict, with or without batch counters.

    Raises:
        Refused: Number or shapes are others.
    """
    wanted = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    for keys in (list(wanted), [key for key in wanted if not key.endswith(COUNTER)]):
        shapes = [(_shape(tensor), _shape(wanted[key])) for tensor, key in zip(given.values(), keys, strict=False)]
        if len(keys) == len(given) and all(a == b for a, b in shapes):
            return Match(dict(zip(given, keys, strict=True)))
    parameters = sum(1 for _ in network.parameters())
    why = "it lacks BatchNorm's statistics" if len(given) == parameters else "check --arch and --classes"
    raise Refused(
        f"the file holds {len(given)} arrays without names, the network has {len(wanted)} tensors, and in this order their "
        f"shapes differ: {why}"
    )


def majority_prefix(keys: Collection[str], known: Sequence[str]) -> str:
    """What wrappers put before most keys."""
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
    """Names by their canonical form; where two have the same form, both keep their own."""
    forms = {key: canonical(key) for key in keys}
    often = Counter(forms.values())
    return {form if often[form] == 1 else key: key for key, form in forms.items()}


def _prefix(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], weights: str | None) -> tuple[str, str, str]:
    """What to cut off the file's names, what to put before them to have the network's, and a note."""
    votes: Counter[tuple[str, str]] = Counter({("", ""): 0})
    for name, tensor in given.items():
        for cut, rest in _suffixes(name):
            if rest in wanted:
                votes[cut, ""] += 1 + (tensor.shape == wanted[rest].shape)
    for name, tensor in wanted.items():
        for put, rest in _suffixes(name):
            if put and rest in given:
                votes["", put] += 1 + (tensor.shape == given[rest].shape)
    if weights is not None:
        votes = Counter({pair: count for pair, count in votes.items() if f".{weights}." in f".{pair[0]}"})
        if not votes:
            raise Refused(f"no tensors of the checkpoint fit the network under {weights!r}: check --weights")
    best = max(votes.values())
    rivals = [pair for pair, count in votes.items() if count >= max(0.9 * best, len(wanted)) and not pair[1]]
    if len(rivals) < 2:
        return *max(votes, key=lambda pair: (votes[pair], len(pair[0]))), ""
    return _of_rivals([cut for cut, _ in rivals])


def _of_rivals(cuts: Sequence[str]) -> tuple[str, str, str]:
    """One of several networks in one state dict: the average, if it is one of two."""
    averages = [cut for cut in cuts if AVERAGED.search(cut.lower())]
    offered = ", ".join(show(cut.rstrip(".")) for cut in cuts)
    if len(cuts) > 2 or len(averages) != 1:
        raise Refused(f"the checkpoint holds several networks that fit: add --weights with one of {offered}")
    note = f"the file holds weights and their average ({offered}): {averages[0].rstrip('.')} is taken; --weights takes another"
    return averages[0], "", note


def _suffixes(name: str) -> Iterable[tuple[str, str]]:
    parts = name.split(".", DEEPEST)
    for count in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:count]), ".".join(parts[count:])


def _missing(network: nn.Module, wanted: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
    """Tensors of the network that the file must hold and does not."""
    found, buffers = set(names.values()), {name for name, _ in network.named_buffers()}
    return [
        key for key in wanted
        if key not in found and not key.endswith(COUNTER) and not AUXILIARY.search(key)
        and (key not in buffers or key.endswith(STATISTICS))
    ]  # fmt: skip


def _renamed_by_hooks(
    network: nn.Module, given: Mapping[str, Tensor], names: Mapping[str, str], cut: str
) -> dict[str, str]:
    """What the network's own loading makes of other names: every tensor is loaded full of its number, and found again."""
    trial = copy.deepcopy(network)
    keys = [key for key in given if canonical(key).startswith(cut)]
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
    cut: str,
    notes: list[str],
) -> None:
    """Refuses what does not fit, and notes what is left aside."""
    missing = _missing(network, wanted, names)
    misshapen = [key for key, name in names.items() if given[key].shape != wanted[name].shape]
    misshapen = [key for key in misshapen if not key.endswith(COUNTER) and not AUXILIARY.search(names[key])]
    left = [key for key in given if key not in names]
    strange = [key for key in left if canonical(key).startswith(cut) and not _needless(canonical(key), given[key])]
    if missing or misshapen or strange:
        raise Refused(_misfit(given, wanted, names, (missing, strange, misshapen)))
    heads = sorted({name.split(".")[0] for name in wanted if AUXILIARY.search(name) and name not in names.values()})
    if heads:
        notes.append(f"the file lacks {some(heads)}: auxiliary heads have no part in the answer")
    aside = [key for key in left if not key.endswith(COUNTER)]
    if aside:
        notes.append(f"not of the network, and carried through as they are: {some(map(show, aside))}")


def _needless(name: str, tensor: Tensor) -> bool:
    """Whether a tensor that the network has no place for has no part in the answer."""
    return (
        not tensor.is_floating_point() or name.rpartition(".")[2] in TABLES
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
    """What is probably wrong, and how to mend it."""
    missing, strange, misshapen = faults
    if not missing and not strange:
        pairs = [(given[key].shape, wanted[names[key]].shape) for key in misshapen]
        heads = {theirs[0] for theirs, ours in pairs if theirs[1:] == ours[1:] and len(theirs) in (1, 2)}
        if len(heads) == 1 and all(theirs[1:] == ours[1:] for theirs, ours in pairs):
            return f"its last layer has {min(heads)} classes: give --classes {min(heads)}"
        kernels = [(theirs, ours) for theirs, ours in pairs if len(theirs) == len(ours) == 4]
        if len(pairs) == len(kernels) == 1:
            theirs, ours = kernels[0]
            if theirs[1] != ours[1] and theirs[2:] == ours[2:]:
                return f"its first layer takes {theirs[1]} channels: give --input {theirs[1]}xHxW"
            return f"its first kernel is {theirs[2]}x{theirs[3]}, not {ours[2]}x{ours[3]}, a variant of this network: check --arch"
        return "a network of other widths: check --arch"
    bare = {canonical(key) for key in (*missing, *strange)}
    if bare and all(name.endswith((*STATISTICS, COUNTER)) for name in bare):
        return "the statistics of BatchNorm are missing, without which it cannot compute: ask for the whole state dict"
    if any(name.endswith(("weight_g", "weight_v")) for name in bare):
        return "one of the two is under weight_norm: build the network as the file's was, or remove it there"
    if any(AVERAGED.search(key) for key in given):
        return "an average of the parameters alone may lack the rest: try --weights, or check --arch"
    if len(missing) + len(strange) + len(misshapen) <= 4:
        return "all tensors match but for these: another variant of this network, check --arch"
    if not missing and not misshapen:
        return "the file has layers that the network lacks: check --arch"
    if not strange and not misshapen:
        return "the network has layers that the file lacks: check --arch"
    return "they are of another architecture: check --arch"


def show(text: object) -> str:
    """A name out of a hostile file, safe to print."""
    return foreign.name(text, longest=100) if isinstance(text, str) else f"<{type(text).__name__}>"


def some(names: Iterable[str], most: int = 6) -> str:
    """The first of them, and how many there are more."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
