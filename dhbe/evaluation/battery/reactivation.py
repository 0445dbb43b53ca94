"""A universal perturbation with the trigger's effect: is the backdoor dormant, or gone?

Universal perturbations: Moosavi-Dezfooli et al. 2017 (arXiv:1610.08401). Every network has them; a backdoor that is hidden
rather than erased makes those towards the target class more successful than those towards other classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dhbe.classifier import Classifier, evaluating
from dhbe.data import Images


def universal_perturbation(
    classifier: Classifier,
    images: Images,
    goal: Tensor,
    *,
    epsilon: float,
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> Tensor:
    """Searches for one perturbation that leads images to their goals, by projected gradient steps on random batches.

    Args:
        classifier: Evaluated in eval mode; the modes of its modules are restored and its gradients not changed.
        images: Images to search on, at least one.
        goal: The class that each image is to be led to, int64 [n].
        epsilon: Largest change of any value (L-infinity), pixels in [0, 1].
        steps: Steps along the sign of the gradient of the cross-entropy, of length `epsilon` / 4 decreasing to 0.
        batch: Images per step.
        generator: Draws the batches.

    Returns:
        The perturbation [1, c, h, w], in [-epsilon, epsilon], on the classifier's device.
    """
    device = classifier.mean.device
    found = torch.zeros(1, *images.shape, device=device)
    with evaluating(classifier):
        for step in range(steps):
            index = torch.randint(len(images), (batch,), generator=generator)
            found.requires_grad_()
            logits = classifier(perturbed(images.float(index).to(device), found))
            (gradient,) = torch.autograd.grad(cross_entropy(logits, goal[index].to(device)), found)
            length = epsilon / 4 * (1 - step / steps)
            found = (found.detach() - length * gradient.sign()).clamp(-epsilon, epsilon)
    return found.detach()


def perturbed(pixels: Tensor, perturbation: Tensor) -> Tensor:
    """Pixels [n, c, h, w] in [0, 1] with the perturbation [1, c, h, w] added, clipped to [0, 1]."""
    return (pixels + perturbation).clamp(0, 1)
