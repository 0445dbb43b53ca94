"""Distances: of activations with and without a trigger, of classes, and of images from their triggered copies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations

import torch
from torch import Tensor, nn

from dhbe.classifier import Classifier, evaluating
from dhbe.data import Images
from dhbe.errors import Refused

Transform = Callable[[Tensor], Tensor]
Box = tuple[float, float, float, float, float]


@torch.no_grad()
def activation_differences(
    classifier: Classifier, images: Images, trigger: Transform, batch: int = 512
) -> dict[str, Tensor]:
    """How much a trigger changes the activations of a classifier (fig. 7).

    Args:
        classifier: Evaluated in eval mode; the modes of its modules are restored.
        images: Images without the trigger.
        trigger: Maps pixels [n, c, h, w] in [0, 1] to triggered ones.
        batch: Images at a time.

    Returns:
        `features_l1`, `features_l2` (penultimate features: the input of the last linear layer), `logits_l1` and
        `logits_l2`: norms of each image's difference, float32 [n]. Without a linear layer, there are no features.

    Raises:
        Refused: There are no images.
    """
    if not len(images):
        raise Refused("activation differences need images, but there are none")
    parts: list[dict[str, Tensor]] = []
    device = classifier.mean.device
    with evaluating(classifier), _listening(classifier) as heard:
        for pixels, _ in images.batches(batch):
            there = pixels.to(device)
            seen = []
            for shown in (there, trigger(there)):
                heard.clear()
                logits = classifier(shown)
                seen.append({"logits": logits} | ({"features": heard[-1].flatten(1)} if heard else {}))
            parts.append(
                {
                    f"{name}_l{order}": (seen[1][name] - seen[0][name]).float().norm(order, dim=1).cpu()
                    for name in seen[0]
                    for order in (1, 2)
                }
            )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def box(values: Tensor) -> Box:
    """The box plot of values [n]: lower whisker, quartiles, upper whisker.

    Whiskers end at the outermost value within 1.5 interquartile ranges of the box (Tukey 1977).

    >>> box(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]))
    (1.0, 2.0, 3.0, 4.0, 4.0)
    """
    ordered = values.double().sort().values
    low, middle, high = ordered.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    reach = 1.5 * (high - low)
    inside = ordered[(ordered >= low - reach) & (ordered <= high + reach)]
    return float(inside[0]), low, middle, high, float(inside[-1])


def trigger_distance(trigger: Transform, pixels: Tensor) -> float:
    """How much a trigger changes images: the mean L1 norm of the change, pixels in [0, 1] (table 1).

    Args:
        trigger: Maps pixels to triggered ones.
        pixels: Images [n, c, h, w] in [0, 1].
    """
    return (trigger(pixels) - pixels).double().abs().flatten(1).sum(1).mean().item()


def directions(count: int, dimensions: int, generator: torch.Generator) -> Tensor:
    """Random unit vectors, uniform on the sphere: [count, dimensions]."""
    drawn = torch.randn(count, dimensions, generator=generator)
    return drawn / drawn.norm(dim=1, keepdim=True)


def shadows(points: Tensor, lines: Tensor) -> Tensor:
    """Sorted projections [k, n] of points [n, d] onto unit vectors [k, d]."""
    return (lines @ points.T).sort(1).values


def wasserstein(here: Tensor, there: Tensor) -> Tensor:
    """1-Wasserstein distances of two sets of points along directions; their mean is the sliced Wasserstein distance.

    Args:
        here: Projections of one set, [k, n].
        there: Projections of the other set onto the same directions, [k, m].

    Returns:
        The distance along each direction, [k].
    """
    if here.shape == there.shape:
        return (here - there).abs().mean(1)
    # Both quantile functions are constant between consecutive steps of either.
    sizes = here.shape[1], there.shape[1]
    steps = torch.cat([torch.arange(1, size + 1, dtype=torch.float64) / size for size in sizes]).sort().values
    widths = steps.diff(prepend=steps.new_zeros(1))
    middles = steps - widths / 2
    mine, other = ((middles * size).long().clamp_max(size - 1) for size in sizes)
    return ((here[:, mine] - there[:, other]).abs() * widths.to(here)).sum(1)


def class_distances(images: Images, count: int, draws: int, at_once: int = 100) -> dict[tuple[int, int], float]:
    """Distances of classes (table 2): dimensions x the largest 1-Wasserstein distance along random directions.

    Args:
        images: Images, whose pixels in [0, 1] are the points of each class.
        count: Directions per draw.
        draws: Number of draws, over which the largest distances are averaged.
        at_once: Directions at a time.

    Returns:
        The distance of each pair of classes, in L1 mass.
    """
    generator, pairs = torch.Generator().manual_seed(0), list(combinations(range(images.classes), 2))
    members = [images.float(images.labels == label).flatten(1) for label in range(images.classes)]
    dimensions, apart = members[0].shape[1], torch.zeros(len(pairs))
    for _ in range(draws):
        largest = torch.zeros(len(pairs))
        for start in range(0, count, at_once):
            lines = directions(min(at_once, count - start), dimensions, generator)
            seen = [shadows(points, lines) for points in members]
            along = torch.stack([wasserstein(seen[a], seen[b]) for a, b in pairs])
            largest = largest.maximum(along.max(1).values)
        apart += dimensions * largest / draws
    return dict(zip(pairs, apart.tolist(), strict=True))


@contextmanager
def _listening(classifier: Classifier) -> Iterator[list[Tensor]]:
    """Records the inputs of linear layers inside, in order of execution; the last is that of the classification layer."""
    heard: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
        for module in classifier.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()
