"""Known data sets: their shapes and normalisation constants."""

from dataclasses import dataclass

from dhbe.data.images import Shape

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet, which are customary for its subsets too."""


@dataclass(frozen=True)
class Known:
    """What is known about a data set before it is read."""

    shape: Shape
    """Channels, height and width, to which image files are converted."""
    classes: int
    mean: tuple[float, ...] | None = None
    """Mean of each channel over the training images, pixels in [0, 1]; None if there is no customary value."""
    std: tuple[float, ...] | None = None
    mirrored: bool = True
    """Whether horizontal flips preserve the class and are customary, unlike for traffic signs and faces."""
    middle: int | None = None
    """Side in pixels of the central square to which larger image files are cropped before resizing."""


KNOWN = {
    "cifar10": Known((3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Known((3, 32, 32), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion-mnist": Known((1, 28, 28), 10, (0.2860,), (0.3530,)),
    "gtsrb": Known((3, 32, 32), 43, (0.3337, 0.3064, 0.3171), (0.2672, 0.2564, 0.2629), mirrored=False),
    "mini-imagenet": Known((3, 64, 64), 100, *IMAGENET),
    "tiny-imagenet": Known((3, 64, 64), 200, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "vggface2-100": Known((3, 64, 64), 100, mirrored=False),
    # The photographs are 250 px, the face fills the middle; constants of the grey copies in circulation.
    "lfw-100": Known((3, 64, 64), 100, (0.4788, 0.4788, 0.4788), (0.2061, 0.2061, 0.2061), mirrored=False, middle=124),
}
"""Data sets by name. scikit-learn's digits are not here: they need no constants."""

MNIST = (0.1307,), (0.3081,)
"""Mean and standard deviation of MNIST."""

NORMALISATION = {"imagenet": IMAGENET, "mnist": MNIST} | {
    name: (known.mean, known.std) for name, known in KNOWN.items() if known.mean and known.std
}
"""Mean and standard deviation of each channel by name of the data set."""
