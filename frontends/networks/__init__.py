"""The networks of the experiments, by name: ``build("vdsr")``, ``build("resnet18", stem="cifar")``.

Super-resolution networks map N x 1 x H x W, the bicubic-upscaled Y channel in [0, 1], to the same shape. Classifiers
map N x 3 x H x W to N x classes: H = W = 224 by the stem "imagenet", 32 by the stem "cifar".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import InputError
from .alexnet import AlexNet
from .googlenet import GoogLeNet
from .resnets import CifarResNet, ResNet18
from .super_resolution import CTSRCNN, VDSR
from .vgg import VGG16

__all__ = ["CTSRCNN", "NETWORKS", "VDSR", "VGG16", "AlexNet", "CifarResNet", "GoogLeNet", "ResNet18", "build"]


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
    "vgg16": VGG16,
    "alexnet": AlexNet,
    "googlenet": GoogLeNet,
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
