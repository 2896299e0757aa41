"""The networks of the experiments, by name: ``build("vdsr")``, ``build("resnet18", stem="cifar")``.

Super-resolution networks map N x 1 x H x W, the bicubic-upscaled Y channel in [0, 1], to the same shape. Classifiers
map N x 3 x H x W to N x classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError

__all__ = ["CTSRCNN", "NETWORKS", "VDSR", "CifarResNet", "ResNet18", "build"]


class CTSRCNN(nn.Module):
    """CT-SRCNN, nine layers for super-resolution: 9x9x64, 5x5x32, six 3x3x32, 5x5x1.

    112,480 weights. With ``residual`` the last layer predicts the difference to the input, as VDSR does, which makes
    training a matter of minutes; the convolutions are the same.

    Reference: Ren, El-Khamy, Lee, "CT-SRCNN: cascade trained and trimmed deep convolutional neural networks for image
    super resolution"; compressed in Choi, El-Khamy, Lee, arXiv 1805.08303.
    """

    KERNELS = (9, 5, 3, 3, 3, 3, 3, 3, 5)
    CHANNELS = (1, 64, 32, 32, 32, 32, 32, 32, 32, 1)

    def __init__(self, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        pairs = zip(self.CHANNELS[:-1], self.CHANNELS[1:], self.KERNELS, strict=True)
        for i, (inputs, outputs, kernel) in enumerate(pairs):
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))
        _initialise_chain(self, residual)

    def forward(self, x: Tensor) -> Tensor:
        return _chain(self, x, self.residual)


class VDSR(nn.Module):
    """Very deep super-resolution: ``depth`` 3x3 convolutions of ``width`` channels predict the residual.

    Reference: Kim, Lee, Lee, "Accurate image super-resolution using very deep convolutional networks", CVPR 2016.
    """

    def __init__(self, depth: int = 20, width: int = 64) -> None:
        super().__init__()
        for i in range(depth):
            inputs, outputs = (1 if i == 0 else width), (1 if i == depth - 1 else width)
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, 3, padding=1))
        _initialise_chain(self, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        return _chain(self, x, residual=True)


def _chain(model: nn.Module, x: Tensor, residual: bool) -> Tensor:
    """The children in turn with ReLU between them, plus the input."""
    *inner, last = model.children()
    y = x
    for layer in inner:
        y = F.relu(layer(y))
    y = last(y)
    return x + y if residual else y


def _initialise_chain(model: nn.Module, residual: bool) -> None:
    """He initialisation; a residual network starts close to the identity."""
    layers = list(model.children())
    for layer in layers:
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is not None
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    if residual:
        with torch.no_grad():
            for parameter in layers[-1].parameters():
                parameter.mul_(0.1)


class _CifarBlock(nn.Module):
    """Two 3x3 convolutions with the parameter-free shortcut (option A): every stride-th pixel, zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.extra = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.extra or self.stride > 1:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet-20, 32, 44, ... for 32x32 images: 6n + 2 layers, three stages of width, 2 width and 4 width channels.

    Reference: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, section 4.2.

    Raises:
        InputError: where ``depth`` is not 6n + 2.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, depth: int = 20, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"a CIFAR ResNet has 6n + 2 layers (20, 32, 44, ...), not {depth}")
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage in range(3):
            outputs = width << stage
            blocks = []
            for i in range((depth - 2) // 6):
                blocks.append(_CifarBlock(inputs, outputs, 2 if stage > 0 and i == 0 else 1))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, classes)
        _initialise_classifier(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class _Block18(nn.Module):
    """ResNet-18's basic block; torchvision's state-dict keys."""

    def __init__(self, inputs: int, outputs: int, stride: int, pool: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1 if pool else stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pool = nn.MaxPool2d(stride, ceil_mode=True) if pool and stride > 1 else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.pool(self.conv1(x))))
        y = self.bn2(self.conv2(y))
        return F.relu(self.downsample(x) + y)


class ResNet18(nn.Module):
    """ResNet-18 with the ImageNet stem (7x7 stride 2, max pooling) or the CIFAR stem (3x3 stride 1).

    ``pool``: each stride-2 3x3 convolution becomes stride 1 followed by max pooling, so that Winograd convolution
    reaches it. The 1x1 shortcuts keep their stride.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, classes: int = 1000, width: int = 64, stem: str = "imagenet", pool: bool = False) -> None:
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1)
        elif stem == "cifar":
            self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
            self.maxpool = nn.Identity()
        else:
            raise InputError(f'unknown ResNet-18 stem "{stem}"; choose "imagenet" or "cifar"')
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage in range(4):
            outputs = width << stage
            first = _Block18(inputs, outputs, 2 if stage else 1, pool)
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, _Block18(outputs, outputs, 1, pool)))
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)
        _initialise_classifier(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def _initialise_classifier(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _resnet(depth: int) -> Callable[..., nn.Module]:
    def make(**options: Any) -> nn.Module:
        return CifarResNet(depth, **options)

    return make


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ct-srcnn": CTSRCNN,
    "vdsr": VDSR,
    "resnet20": _resnet(20),
    "resnet32": _resnet(32),
    "resnet18": ResNet18,
}
"""The registry of ``build``."""


def build(name: str, **options: Any) -> nn.Module:
    """Make the network ``name`` of NETWORKS with its options.

    Raises:
        InputError: for an unknown name or option, or a value that it cannot have.
    """
    if name not in NETWORKS:
        raise InputError(f'unknown network "{name}"; choose one of {", ".join(NETWORKS)}')
    if small := [key for key, value in options.items() if type(value) is int and value < 1]:
        raise InputError(f'network "{name}": {small[0]} is {options[small[0]]}; it must be at least 1')
    try:
        return NETWORKS[name](**options)
    except TypeError as error:
        raise InputError(f'network "{name}": {error}') from error
