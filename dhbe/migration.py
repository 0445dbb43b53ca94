"""Migrates records from format 1 to format 2."""

from typing import Any

from dhbe.settings import RENAMED

FAMILIES = {
    "patches": "a patch at any place",
    "masked": "a few pixels at one place",
    "masked_half": "fewer pixels at one place",
    "faint": "a faint pattern over the whole image",
    "waves": "a few waves over the whole image",
}
"""The trigger families of that format, whose records lack these descriptions."""


def migrated(record: dict[str, Any]) -> dict[str, Any]:
    """A record of format 1 converted to format 2; invalid parts are kept for the validation.

    Settings of `fast` have new names, a lead is now a margin, the familiarity of images the BatchNorm-statistics loss, and
    `success` the gain of a trigger (a soft share) in an erase and a success rate (a share) elsewhere.
    """
    new = {**record, "format": 2}
    ours = isinstance(record.get("defense"), dict) and record["defense"].get("name") == "dhbe"
    if ours and "warm_up" in record["defense"]:
        new["defense"] = {RENAMED.get(name, name): value for name, value in record["defense"].items()}
        new["families"] = FAMILIES
    success = "success_rate" if record.get("kind") != "erase" else "gain" if ours else "success"
    if isinstance(record.get("curve"), list):
        new["curve"] = [_renamed(point, success) for point in record["curve"]]
    for state in ("before", "after"):
        if isinstance(record.get(state), dict) and isinstance(record[state].get("signs"), dict):
            new[state] = {**record[state], "signs": _renamed(record[state]["signs"], success)}
    if isinstance(record.get("classes"), list):
        new["classes"] = [_renamed(found, success, lead="margin") for found in record["classes"]]
    return new


def _renamed(values: Any, success: str, **more: str) -> Any:
    if not isinstance(values, dict):
        return values
    names = {
        "success": success,
        "familiarity": "bn_loss",
        **{f"lead_{name}": f"margin_{name}" for name in FAMILIES},
        **more,
    }
    return {names.get(name, name): value for name, value in values.items()}
