"""Explanations of signs, curves, activations and pictures, by name."""

from collections.abc import Mapping, Sequence

SIGNS = {
    "agreement": "Share of generated images to which the cleaned and the suspect model assign the same class.",
    "reaction": "Mean absolute change of the logits under generated triggers. Smaller is better.",
    "flips": "Share of generated images whose class changes under generated triggers.",
    "anomaly_index": "How far the class that stands out most does so, in robust standard deviations of all classes.",
    "suspected_class": "The class that stands out most, counted from 0.",
    "evidence": "Evidence by trigger-free statistics against the class that they point to most. A value of 1 or more accuses it.",
    "left": "How far the suspected class still stands out in a fresh search of the cleaned model.",
    "probability": "Probability of a backdoor by the index, if half of all models have one.",
    "gain": "Soft share of images that the strongest trigger found, alone or repeated, newly leads to its class.",
    "success_rate": "Share of images that the strongest trigger found leads to that class.",
    "found_again": "How far the class stands out in a fresh search.",
    "drift": "Mean change of BatchNorm means, in standard deviations.",
    "targeted": "Largest share of images that a trigger found in this model leads to one class: {}.",
    "untargeted": "Share of images whose class changes under a trigger found in this model: {}.",
}
"""Explanation of each sign; those with braces exist for each family of triggers."""

CURVES = {
    "margin": "Mean margin, in logits, of the classes under their triggers: {}. The search maximises it.",
    "bn_loss": "BatchNorm-statistics loss: distance of the generated images from the statistics of the layers.",
    "distillation": "Gap between the two models' logits on generated images. The student minimises it.",
    "restriction": "Change of the student's logits under generated triggers. The student minimises it.",
    "disagreement": "Gap between the two models' logits in the image generator's step. The generator maximises it.",
    "reaction": "Change of the student's logits in the trigger generator's step. The generator maximises it.",
    "loss": "Training loss.",
    "mask": "Size of the smallest trigger found, in pixels.",
    "gain": "Soft share of images that the strongest trigger in the bank, alone or repeated, newly leads to its class.",
    "success": "Share of images that the triggers found lead to their class.",
    "agreement": "Share of images to which the cleaned and the suspect model assign the same class.",
    "index": "Anomaly index of the smallest trigger. Above 2 is suspicious.",
    "pruned": "Share of the channels or filters that were pruned.",
}
"""Explanation of each curve; those with braces exist for each family of triggers."""

ACTIVATIONS = {
    "features_l1": "Penultimate features, L1 norm.",
    "features_l2": "Penultimate features, L2 norm.",
    "logits_l1": "Logits, L1 norm.",
    "logits_l2": "Logits, L2 norm.",
}
"""Activations whose change under the trigger is measured, and the norm of that change."""

PICTURES = {
    "samples": "Images used by the method: generated from the model alone, or crops of two public photographs.",
    "triggers": "Triggers found or generated, which the cleaned model learned to ignore.",
    "trigger": "The trigger on a grey image.",
    "stamped": "Images with the trigger.",
    "found": "The strongest trigger found, on a grey image.",
    "found_each": "The trigger found for each class that was searched, in order of the classes.",
}
"""Caption of each picture."""


OF_CLEANED = ("gain", "left", "success")
"""Signs that records list under the suspect model although they describe the cleaned one."""


def placed(signs: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The signs of one or two states, each under the model that it describes."""
    if len(signs) != 2:
        return [dict(each) for each in signs]
    before, after = signs
    moved = {name: value for name, value in before.items() if name in OF_CLEANED}
    return [{name: value for name, value in before.items() if name not in moved}, {**moved, **after}]


def meaning(names: Mapping[str, str], name: str, families: Mapping[str, str]) -> str | None:
    """The explanation of a sign or curve; None if it is unknown.

    Args:
        names: `SIGNS` or `CURVES`.
        name: Name of the sign or curve, which ends in the family's name if it belongs to one.
        families: Description of each family by name.
    """
    kind, _, family = name.partition("_")
    if family in families and kind in names:
        return names[kind].format(families[family])
    return names.get(name)
