"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv:1605.07146), with the customary state-dict keys."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu

from dhbe.networks.resnet import initialise


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each 3x3 convolution; if the width changes, the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, width, 1, stride, bias=False) if inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(relu(self.bn2(self.conv1(active))))


class WideResNet(nn.Module):
    """Three stages of pre-activation blocks, 16, 32 and 64 channels times `factor`; returns logits.

    Args:
        depth: Number of convolutions on the main path plus the linear layer: 6 n + 4 for n blocks per stage.
        factor: Widening factor of the stages.
        classes: Number of classes.
        channels: Channels of the images.
    """

    def __init__(self, depth: int, factor: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.block1 = _stage(blocks, 16, 16 * factor, 1)
        self.block2 = _stage(blocks, 16 * factor, 32 * factor, 2)
        self.block3 = _stage(blocks, 32 * factor, 64 * factor, 2)
        self.bn1 = nn.BatchNorm2d(64 * factor)
        self.fc = nn.Linear(64 * factor, classes)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features [n, 64 factor] of normalised images [n, c, h, w]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return adaptive_avg_pool2d(relu(self.bn1(x)), 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of normalised images [n, c, h, w]."""
        return self.fc(self.features(x))


def _stage(blocks: int, inputs: int, width: int, stride: int) -> nn.Module:
    layers = [PreActBlock(inputs, width, stride), *(PreActBlock(width, width, 1) for _ in range(blocks - 1))]
    return nn.Sequential(OrderedDict(layer=nn.Sequential(*layers)))
