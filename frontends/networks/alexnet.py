"""AlexNet."""

from __future__ import annotations

from torch import nn

from .blocks import check_stem, convolution, initialise_classifier

__all__ = ["AlexNet"]


class AlexNet(nn.Sequential):
    """The one-tower form of Krizhevsky, arXiv 1404.5997, without local response normalisation.

    N x 3 x 224 x 224 to N x classes; by the stem "cifar" N x 3 x 32 x 32: 5x5 of stride 1 first, BatchNorm, and
    fully-connected layers of 16 width outputs in place of 64 width.
    """

    def __init__(self, classes: int = 1000, width: int = 64, stem: str = "imagenet") -> None:
        check_stem("AlexNet", stem)
        is_small = stem == "cifar"
        first = (5, 1, 2) if is_small else (11, 4, 2)
        size, hidden = (3, 16 * width) if is_small else (6, 64 * width)
        super().__init__(
            *convolution(3, width, *first, batch_norm=is_small),
            nn.MaxPool2d(3, 2),
            *convolution(width, 3 * width, 5, batch_norm=is_small),
            nn.MaxPool2d(3, 2),
            *convolution(3 * width, 6 * width, 3, batch_norm=is_small),
            *convolution(6 * width, 4 * width, 3, batch_norm=is_small),
            *convolution(4 * width, 4 * width, 3, batch_norm=is_small),
            nn.MaxPool2d(3, 2),
            nn.Flatten(),
            nn.Linear(4 * width * size**2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )
        initialise_classifier(self)
