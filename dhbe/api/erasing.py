"""Cleaning a classifier: by DHBE, which needs no data, or by a defence of other authors."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from dhbe import suspects
from dhbe.api.running import Erasure, Options, run
from dhbe.data import Images, Shape, clean_subset, load_pictures
from dhbe.defenses import PRESETS, Defense, Eraser, FastDHBE, Known
from dhbe.errors import Refused
from dhbe.suspects import Suspect


def erase(
    model: nn.Module | Suspect,
    *,
    input_shape: Shape | None = None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    output: str | None = None,
    preset: str = "fast",
    defense: Eraser | None = None,
    images: str | Path | None = None,
    **options: Unpack[Options],
) -> Erasure:
    """Removes a backdoor from a classifier without data and returns a cleaned one of the same architecture.

    Args:
        model: The suspect network, which takes normalised images, or what `suspects.load` returned. It is not changed.
        input_shape: Image shape (channels, height, width); square, 8 px or more. Not for a `Suspect`, which has its own.
        mean: Mean of each channel with which the network's input is normalised, pixels in [0, 1]; or the name of a data
            set, such as `imagenet`; or `auto`: the known constants that fit the BatchNorm statistics best. None means 0, and
            the verdict is `unclear` if these statistics contradict it.
        std: The standard deviation, likewise; None means that of the named data set, or 1.
        output: Which of several outputs holds the logits, by number or name; None if only one can.
        preset: `fast`, `paper` or `official`.
        defense: Hyperparameters; None means the preset's. If its class differs from the preset's, the record has preset `none`.
        images: A folder of any pictures, without labels, from which `fast` cuts its images instead of two photographs. They
            help most where they resemble what the model was trained on.
        **options: Seed, device, evidence, folder, ...: see `Options`.

    Raises:
        Refused: The model, the settings or the pictures cannot be used.
        Failed: The run diverged, or its results could not be written.
    """
    suspect = suspects.of(model, input_shape, mean, std, output)
    if preset not in PRESETS:
        raise Refused(f"no preset {preset!r}; available: {', '.join(PRESETS)}")
    defense = defense or PRESETS[preset]
    named = {"name": "dhbe", "preset": preset if type(defense) is type(PRESETS[preset]) else "none"}
    known = Known()
    if images is not None:
        if "pictures" not in defense.uses:
            raise Refused(
                f"--images: the preset {preset} generates all its images: leave it out, or use the preset fast"
            )
        pictures, notes = load_pictures(Path(images))
        suspect = replace(suspect, warnings=(*suspect.warnings, *notes))
        known = Known(pictures=pictures)
        named |= {"pictures": len(pictures), "pictures_sha256": _content(*pictures)}
    return run(suspect, defense, known, named, exact=not isinstance(defense, FastDHBE), **options)


def defend(
    model: nn.Module | Suspect,
    defense: Defense,
    *,
    input_shape: Shape | None = None,
    mean: float | Sequence[float] | str | None = None,
    std: float | Sequence[float] | str | None = None,
    output: str | None = None,
    clean: Images | None = None,
    source: str = "",
    images: int = 2000,
    target: int | None = None,
    **options: Unpack[Options],
) -> Erasure:
    """Runs a defence of other authors, which is handed what it declares to need and nothing else.

    Args:
        model: The suspect network or what `suspects.load` returned, as in `erase`. It is not changed.
        defense: The defence with its hyperparameters.
        input_shape: Image shape, as in `erase`.
        mean: Mean of each channel, as in `erase`.
        std: Standard deviation of each channel, as in `erase`.
        output: As in `erase`.
        clean: Clean images with labels, for a defence that needs them.
        source: Name of the data that `clean` comes from, for the record.
        images: How many of `clean` the defence gets, chosen by the seed; all if there are fewer.
        target: The target class, for a defence that needs it.
        **options: As in `erase`; `auto` precision is fp32, as in the papers.

    Raises:
        Refused: The model, the settings, the clean images or the target class cannot be used.
        Failed: The run diverged, or its results could not be written.
    """
    suspect = suspects.of(model, input_shape, mean, std, output)
    lent: dict[str, Any] = {}
    if clean is None or "clean images" not in defense.needs:
        clean = None
    else:
        clean = clean_subset(clean, images, options.get("seed", 0)) if images < len(clean) else clean
        lent |= {"clean": source, "images": len(clean), "images_sha256": _content(clean.pixels, clean.labels)}
    if target is None or "target class" not in defense.needs:
        target = None
    elif not 0 <= target < suspect.info.classes:
        raise Refused(f"no target class {target}: the model has classes 0 to {suspect.info.classes - 1}")
    else:
        lent["known_target"] = target
    return run(suspect, defense, Known(clean, target), {"name": defense.name, **lent}, exact=True, **options)


def _content(*tensors: Tensor) -> str:
    """The SHA-256 of all values, in order."""
    content = hashlib.sha256()
    for each in tensors:
        content.update(each.contiguous().numpy().tobytes())
    return content.hexdigest()
