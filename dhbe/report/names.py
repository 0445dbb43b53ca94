"""What signs, curves, activations and pictures mean, by name."""

SIGNS = {
    "agreement": "Share of generated images for which the cleaned and the suspect model choose the same class.",
    "reaction": "Mean absolute change of the logits under generated triggers. Smaller is calmer.",
    "flips": "Share of generated images whose class changes under generated triggers.",
    "familiarity": "Distance of the generated images from what the model's BatchNorm layers remember of real ones.",
    "anomaly_index": "How far the class that stands out most does, in robust standard deviations of all classes.",
    "suspected_class": "That class, from 0.",
    "probability": "Of a backdoor, by the index, if half of all models have one.",
    "success": "Share of images that the strongest trigger found leads to that class.",
    "found_again": "How far the class stands out in a fresh search.",
    "drift": "How far BatchNorm means moved, in standard deviations.",
    **{
        f"{aim}_{name}": what.format(kind)
        for aim, what in (
            ("targeted", "Largest share of images that one trigger leads to one class, found in this model: {}."),
            ("untargeted", "Share of images whose class one trigger changes, found in this model: {}."),
        )
        for name, kind in (
            ("patches", "a patch anywhere"),
            ("masked", "few pixels"),
            ("masked_half", "fewer pixels"),
            ("faint", "a faint pattern"),
            ("waves", "a few waves"),
        )
    },
}
"""What a sign means."""

CURVES = {
    "lead_patches": "How far patches at random places bring their classes to lead, in logits.",
    "lead_masked": "The same of patterns that show few pixels at one place.",
    "lead_masked_half": "The same with half as many pixels.",
    "lead_faint": "The same of faint patterns over the whole image.",
    "lead_waves": "The same of sums of a few waves over the whole image.",
    "familiarity": "Distance of the generated images from the model's BatchNorm statistics.",
    "distillation": "Gap between the two models' logits on generated images. The student makes it small.",
    "restriction": "Change of the student's logits under generated triggers. The student makes it small.",
    "disagreement": "The gap again, as the image generator finds it. It seeks large values.",
    "reaction": "The change again, as the trigger generator finds it. It seeks large values.",
    "margin": "How far a class leads under the patch that seeks it, in logits, over all classes. The patches raise it.",
    "loss": "The loss that training makes small.",
    "mask": "Size of the smallest trigger found, in pixels.",
    "success": "Share of images that the triggers found bring to their class.",
    "agreement": "Share of images for which the cleaned and the suspect model choose the same class.",
    "index": "Anomaly index of the smallest trigger. Above 2 is suspicious.",
    "pruned": "Share of the channels or filters that were pruned.",
}
"""What a curve means."""

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
    "found": "The trigger found for the class that stands out most, on a grey image.",
    "found_each": "The trigger found for each class, from class 0 on.",
}
"""What a picture shows."""
