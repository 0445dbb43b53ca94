"""Residual networks for small images (He et al. 2016, arXiv:1512.03385), with torchvision's state-dict keys."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet(nn.Module):
    """A 3x3 stem of stride 1, stages of basic blocks, global average pooling, one linear layer.

    The width doubles and the side halves from stage to stage. The paper replaces the 7x7 stem of the ImageNet network; for
    32 px it also removes the max-pooling, for 64 px it keeps it (our reading of sec. 5.1.2, whose sizes are missing in our
    copy). Both variants have the same parameters.

    Args:
        blocks: Number of blocks in each stage.
        width: Channels of the stem and of the first stage.
        classes: Number of classes.
        channels: Channels of the images.
        pool: Whether a 3x3 max-pooling of stride 2 follows the stem.
    """

    def __init__(self, blocks: Sequence[int], width: int, classes: int, channels: int = 3, pool: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        self.stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        inputs = width
        for number, (name, depth) in enumerate(zip(self.stages, blocks, strict=True)):
            outputs, stride = width * 2**number, 2 if number else 1
            rest = [BasicBlock(outputs, outputs, 1) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(BasicBlock(inputs, outputs, stride), *rest))
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features [n, d] of normalised images [n, c, h, w]."""
        x = self.maxpool(relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return adaptive_avg_pool2d(x, 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of normalised images [n, c, h, w]."""
        return self.fc(self.features(x))


def initialise(network: nn.Module) -> None:
    """Initialises convolutions with N(0, 2 / fan_out), which preserves gradient norms (He et al. 2015, arXiv:1502.01852)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # drawing on meta would import half of torch
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
