"""GoogLeNet."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..errors import InputError
from .blocks import check_stem, convolution, initialise_classifier

__all__ = ["GoogLeNet"]

_UNIT = 8
"""Channels in the paper's table are multiples of this."""


def _normalised(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(*convolution(inputs, outputs, size, stride, batch_norm=True))


class _Inception(nn.Module):
    """Table 1 of Szegedy et al., one line: 1x1, 3x3 and 5x5 behind 1x1, and pooling with 1x1, side by side."""

    def __init__(self, inputs: int, one: int, to3: int, three: int, to5: int, five: int, pool: int) -> None:
        super().__init__()
        self.one = _normalised(inputs, one, 1)
        self.three = nn.Sequential(_normalised(inputs, to3, 1), _normalised(to3, three, 3))
        self.five = nn.Sequential(_normalised(inputs, to5, 1), _normalised(to5, five, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), _normalised(inputs, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class GoogLeNet(nn.Sequential):
    """Szegedy et al., "Going deeper with convolutions", CVPR 2015, Table 1, with 5x5 as printed there, without the
    auxiliary heads; BatchNorm after every convolution in place of local response normalisation.

    N x 3 x 224 x 224 to N x classes; by the stem "cifar" N x 3 x 32 x 32: a 3x3 convolution and one pooling before the
    first inception in place of three convolutions and two. ``width`` scales all channels, 64 is the paper's.

    Raises:
        InputError: where ``width`` is no multiple of 8.
    """

    INCEPTIONS = (
        ((192, 64, 96, 128, 16, 32, 32), (256, 128, 128, 192, 32, 96, 64)),
        (
            (480, 192, 96, 208, 16, 48, 64),
            (512, 160, 112, 224, 24, 64, 64),
            (512, 128, 128, 256, 24, 64, 64),
            (512, 112, 144, 288, 32, 64, 64),
            (528, 256, 160, 320, 32, 128, 128),
        ),
        ((832, 256, 160, 320, 32, 128, 128), (832, 384, 192, 384, 48, 128, 128)),
    )
    """Between two poolings: inputs and outputs, see ``_Inception``."""

    def __init__(self, classes: int = 1000, width: int = 64, stem: str = "imagenet") -> None:
        check_stem("GoogLeNet", stem)
        if width % _UNIT:
            raise InputError(f"GoogLeNet: width is {width}; it must be a multiple of {_UNIT}")

        def scaled(channels: int) -> int:
            return channels * width // 64

        halve = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
        if stem == "cifar":
            layers: list[nn.Module] = [_normalised(3, scaled(192), 3)]
        else:
            layers = [_normalised(3, width, 7, 2), halve(), _normalised(width, width, 1)]
            layers.append(_normalised(width, scaled(192), 3))
        for group in self.INCEPTIONS:
            layers += [halve(), *(_Inception(*map(scaled, channels)) for channels in group)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(scaled(1024), classes)]
        super().__init__(*layers)
        initialise_classifier(self)
