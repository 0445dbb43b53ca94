"""Networks other than ResNets, like those of third parties, for images of 3x32x32."""

from torch import nn


def flat(classes: int) -> nn.Module:
    """A network that flattens its features, so that a trigger acts only at its position; BatchNorm, ELU and dropout."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ELU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 4 * 4, classes))


def plain(classes: int) -> nn.Module:
    """A network that flattens its features and has no BatchNorm."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, classes))


def layered(classes: int) -> nn.Module:
    """A network with GroupNorm over all channels, GELU and global pooling."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 24, 1), (24, 48, 2), (48, 96, 2)):
        layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.GroupNorm(1, after), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, classes))
