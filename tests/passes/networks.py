"""Networks in the style of the ones people have, small enough for CI."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_bn(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1, padding: int | None = None
) -> nn.Sequential:
    padding = size // 2 if padding is None else padding
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv_bn(inputs, outputs, stride=stride)
        self.conv2 = conv_bn(outputs, outputs)
        self.shortcut = conv_bn(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


def resnet20(width: int = 16, blocks: int = 3) -> nn.Sequential:
    """CIFAR ResNet of 6 * blocks + 2 layers."""
    stages: list[nn.Module] = [conv_bn(3, width), nn.ReLU()]
    inputs = width
    for stage in range(3):
        for block in range(blocks):
            outputs = width << stage
            stages.append(BasicBlock(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def resnet18() -> nn.Sequential:
    """ImageNet ResNet-18."""
    stages: list[nn.Module] = [conv_bn(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage in range(4):
        for block in range(2):
            outputs = 64 << stage
            stages.append(BasicBlock(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def mobilenet(width: int = 8) -> nn.Sequential:
    """Depthwise separable convolutions, MobileNetV1."""
    layers: list[nn.Module] = [conv_bn(3, width, stride=2), nn.ReLU6()]
    for inputs, outputs, stride in ((width, 2 * width, 1), (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)):
        layers += [conv_bn(inputs, inputs, stride=stride, groups=inputs), nn.ReLU6(), conv_bn(inputs, outputs, 1)]
        layers.append(nn.ReLU6())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def ct_srcnn(width: int = 8) -> nn.Sequential:
    """The nine-layer super-resolution network: 9x9, 5x5, six 3x3, 5x5."""
    sizes = [(9, 1, 2 * width), (5, 2 * width, width), *[(3, width, width)] * 6]
    layers: list[nn.Module] = []
    for size, inputs, outputs in sizes:
        layers += [nn.Conv2d(inputs, outputs, size, padding=size // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 5, padding=2))


def oddities() -> nn.Sequential:
    """Every attribute that a careless rewrite gets wrong."""
    return nn.Sequential(
        nn.ZeroPad2d((0, 3, 1, 2)),  # asymmetric
        nn.Conv2d(3, 10, 3, stride=(2, 1)),
        nn.PReLU(10),
        nn.Conv2d(10, 15, 3, padding=2, dilation=2, groups=5),
        nn.LeakyReLU(0.1),
        nn.Conv2d(15, 7, 1, stride=2),  # strided 1x1; 7 channels leave a remainder for every block
        nn.Tanh(),
        nn.Conv2d(7, 9, (1, 5), padding=(0, 2)),
        nn.Conv2d(9, 6, (4, 2), padding=(3, 0), dilation=(1, 2)),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 11, 5, padding=2, groups=1),
    )
