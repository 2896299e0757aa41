"""VGG-16."""

from __future__ import annotations

from torch import nn

from .blocks import check_stem, convolution, initialise_classifier

__all__ = ["VGG16"]


class VGG16(nn.Sequential):
    """Configuration D of Simonyan, Zisserman, arXiv 1409.1556: 13 3x3 convolutions in five stages, and
    fully-connected layers.

    N x 3 x 224 x 224 to N x classes; by the stem "cifar" N x 3 x 32 x 32, with BatchNorm, and two fully-connected
    layers, the first of 8 width outputs, in place of three.
    """

    STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
    """Channels, in widths, and convolutions."""

    def __init__(self, classes: int = 1000, width: int = 64, stem: str = "imagenet") -> None:
        check_stem("VGG-16", stem)
        is_small = stem == "cifar"
        layers: list[nn.Module] = []
        inputs = 3
        for widths, count in self.STAGES:
            for _ in range(count):
                layers += convolution(inputs, widths * width, 3, batch_norm=is_small)
                inputs = widths * width
            layers.append(nn.MaxPool2d(2))
        layers.append(nn.Flatten())
        if is_small:
            layers += [nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, classes)]
        else:
            layers += [nn.Linear(inputs * 7 * 7, 64 * width), nn.ReLU()]
            layers += [nn.Linear(64 * width, 64 * width), nn.ReLU(), nn.Linear(64 * width, classes)]
        super().__init__(*layers)
        initialise_classifier(self)
