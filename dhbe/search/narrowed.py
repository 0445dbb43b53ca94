"""A classifier with many classes restricted to a few, as the cost of a search grows with the number of classes.

A target class is recognised by how far it stands out from the others, and some twenty classes are enough for a median and a
median absolute deviation. So the search covers the classes that cheap statistics rank most suspicious and random others,
from which the robust index is computed. The suspicious ones are too few to distort it.
"""

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier

SEARCHED = 20
"""Number of classes searched; a classifier with no more than these is searched completely."""

SUSPICIOUS = 6
"""How many of them cheap statistics choose; the others are drawn at random."""


class Narrowed(Classifier):
    """A classifier restricted to some classes, plus one for all others, whose logit is the largest of theirs.

    The margins of the selected classes are unchanged. Weights and modules are shared with the classifier.

    Args:
        whole: The classifier, with more classes than `labels`.
        labels: Distinct classes [k].
    """

    def __init__(self, whole: Classifier, labels: Tensor) -> None:
        nn.Module.__init__(self)
        self.whole = whole
        self.labels = labels
        self.shape, self.contiguous = whole.shape, whole.contiguous
        self.classes = len(labels) + 1
        self.mean, self.std = whole.mean, whole.std
        others = torch.ones(whole.classes, dtype=torch.bool, device=labels.device)
        others[labels] = False
        self._others = others.nonzero().flatten()

    def logits(self, normalised: Tensor) -> Tensor:
        """Logits [n, k + 1] of normalised images [n, c, h, w]."""
        every = self.whole.logits(normalised)
        return torch.cat([every[:, self.labels], every[:, self._others].amax(1, keepdim=True)], 1)


def named(rankings: list[Tensor], count: int) -> list[int]:
    """Picks the top classes of several statistics in rotation, without duplicates.

    Args:
        rankings: Values of each class [classes] by each statistic; larger is more suspicious.
        count: Number of classes to pick.

    >>> named([torch.tensor([0.0, 3.0, 2.0, 1.0]), torch.tensor([5.0, 1.0, 4.0, 2.0])], 3)
    [1, 0, 2]
    """
    orders = [values.argsort(descending=True).tolist() for values in rankings]
    return list(dict.fromkeys(label for turn in zip(*orders, strict=True) for label in turn))[:count]


def narrowed(model: Classifier, rankings: list[Tensor]) -> Narrowed:
    """Restricts a classifier to the `SUSPICIOUS` classes that statistics pick and random others, `SEARCHED` in all.

    Args:
        model: A classifier with more than `SEARCHED` classes.
        rankings: As for `named`.
    """
    first = named(rankings, SUSPICIOUS)
    drawn = [label for label in torch.randperm(model.classes).tolist() if label not in first]
    return Narrowed(model, torch.tensor(sorted([*first, *drawn[: SEARCHED - len(first)]])))
