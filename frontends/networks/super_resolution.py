"""Networks for super-resolution: N x 1 x H x W, the bicubic-upscaled Y channel in [0, 1], to the same shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CTSRCNN", "VDSR"]


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
