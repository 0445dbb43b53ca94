"""A classifier of many classes, seen through a few: the cost of a search grows with the classes that it looks at.

What tells a backdoor's class is how far it stands out of the others, and for a median and a median absolute deviation a
score of others is enough. So the classes that cheap statistics find most suspicious are searched, beside others by
chance, of which the robust index is made. The suspicious are so few that they hardly move it.
"""

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier

SEARCHED = 20
"""Classes that are searched; a classifier of no more is searched whole."""

SUSPICIOUS = 6
"""Of them, those that cheap statistics name; the others are drawn."""


class Narrowed(Classifier):
    """Some classes of a classifier, and one more that stands for all others: its logit is the largest of theirs.

    So the margin of each of the classes is what it was. Weights and modules are those of the classifier.

    Args:
        whole: The classifier, with more classes than `labels`.
        labels: Different classes [k].
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
        """Logits [n, k + 1] of images that are normalised already."""
        every = self.whole.logits(normalised)
        return torch.cat([every[:, self.labels], every[:, self._others].amax(1, keepdim=True)], 1)


def named(rankings: list[Tensor], count: int) -> list[int]:
    """The first classes that several statistics name in turns, each once.

    Args:
        rankings: Values of each class [classes] by each statistic; the larger, the more suspicious.
        count: Classes wanted.

    >>> named([torch.tensor([0.0, 3.0, 2.0, 1.0]), torch.tensor([5.0, 1.0, 4.0, 2.0])], 3)
    [1, 0, 2]
    """
    orders = [values.argsort(descending=True).tolist() for values in rankings]
    return list(dict.fromkeys(label for turn in zip(*orders, strict=True) for label in turn))[:count]


def narrowed(model: Classifier, rankings: list[Tensor]) -> Narrowed:
    """The classifier seen through the `SUSPICIOUS` classes that statistics name and others by chance.

    Args:
        model: With more than `SEARCHED` classes.
        rankings: As for `named`.
    """
    first = named(rankings, SUSPICIOUS)
    drawn = [label for label in torch.randperm(model.classes).tolist() if label not in first]
    return Narrowed(model, torch.tensor(sorted([*first, *drawn[: SEARCHED - len(first)]])))
