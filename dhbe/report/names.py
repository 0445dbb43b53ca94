"""What signs, curves, activations and pictures mean, by name."""

from collections.abc import Mapping, Sequence

SIGNS = {
    "agreement": "Share of generated images for which the cleaned and the suspect model choose the same class.",
    "reaction": "Mean absolute change of the logits under generated triggers. Smaller is calmer.",
    "flips": "Share of generated images whose class changes under generated triggers.",
    "anomaly_index": "How far the class that stands out most does, in robust standard deviations of all classes.",
    "suspected_class": "That class, from 0.",
    "evidence": "What the statistics that need no trigger come to, for the class that they point at most. From 1 on they accuse it.",
    "left": "How far the suspected class still stands out in the cleaned model, searched afresh.",
    "probability": "Of a backdoor, by the index, if half of all models have one.",
    "gain": "How much more of the images the strongest trigger found brings to its class, alone or repeated: a soft share.",
    "success_rate": "Share of images that the strongest trigger found leads to that class.",
    "found_again": "How far the class stands out in a fresh search.",
    "drift": "How far BatchNorm means moved, in standard deviations.",
    "targeted": "Largest share of images that one trigger leads to one class, found in this model: {}.",
    "untargeted": "Share of images whose class one trigger changes, found in this model: {}.",
}
"""What a sign means; with braces, one for each family of triggers."""

CURVES = {
    "margin": "Mean margin, in logits, of the classes under the triggers that seek them: {}. The search raises it.",
    "bn_loss": "BatchNorm-statistics loss of the generated images: their distance from what the layers remember.",
    "distillation": "Gap between the two models' logits on generated images. The student makes it small.",
    "restriction": "Change of the student's logits under generated triggers. The student makes it small.",
    "disagreement": "The gap again, as the image generator finds it. It seeks large values.",
    "reaction": "The change again, as the trigger generator finds it. It seeks large values.",
    "loss": "The loss that training makes small.",
    "mask": "Size of the smallest trigger found, in pixels.",
    "gain": "How much more of the images the strongest trigger known brings to its class, alone or repeated: a soft share.",
    "success": "Share of images that the triggers found bring to their class.",
    "agreement": "Share of images for which the cleaned and the suspect model choose the same class.",
    "index": "Anomaly index of the smallest trigger. Above 2 is suspicious.",
    "pruned": "Share of the channels or filters that were pruned.",
}
"""What a curve means; with braces, one for each family of triggers."""

ACTIVATIONS = {
    "features_l1": "Penultimate features, L1 norm.",
    "features_l2": "Penultimate features, L2 norm.",
    "logits_l1": "Logits, L1 norm.",
    "logits_l2": "Logits, L2 norm.",
}
"""What moved under the trigger, and how it is measured."""

PICTURES = {
    "samples": "Images that the method looked at: generated from the model alone, or pieces of two public photographs.",
    "triggers": "Triggers found or generated, which the cleaned model learned to ignore.",
    "trigger": "The trigger on an empty image.",
    "stamped": "Images with the trigger.",
    "found": "The strongest trigger found, on a grey image.",
    "found_each": "The trigger found for each class that was searched, in the order of their numbers.",
}
"""What a picture shows."""


OF_CLEANED = ("gain", "left", "success")
"""Signs that a run tells of the suspect model's triggers, and that are of the cleaned model."""


def placed(signs: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The signs of one state or two, each with the model that it is of."""
    if len(signs) != 2:
        return [dict(each) for each in signs]
    before, after = signs
    moved = {name: value for name, value in before.items() if name in OF_CLEANED}
    return [{name: value for name, value in before.items() if name not in moved}, {**moved, **after}]


def meaning(names: Mapping[str, str], name: str, families: Mapping[str, str]) -> str | None:
    """What a sign or curve means, or None for one that nobody knows.

    Args:
        names: `SIGNS` or `CURVES`.
        name: Of a sign or curve; those of a family of triggers end in its name.
        families: What each family is, by name.
    """
    kind, _, family = name.partition("_")
    if family in families and kind in names:
        return names[kind].format(families[family])
    return names.get(name)
