"""Biases, and what is left of BatchNorm, in few binary digits: coded, they take a third of float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .coding.floats import shortened
from .quantization import layers_of

__all__ = ["shorten_"]

DIGITS = 8
"""Binary digits behind the point: errors of 2^-10 of a number on average, far below those of quantised weights."""


@torch.no_grad()
def shorten_(model: nn.Module, digits: int = DIGITS) -> None:
    """Round biases of convolutions and linear layers, and BatchNorm's scale and shift, in place.

    BatchNorm with running statistics becomes what it is in evaluation: a scale and a shift, its mean 0 and its variance
    1. Do not train it further.
    """
    for module in layers_of(model).values():
        if module.bias is not None:
            _set(module.bias, module.bias, digits)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.running_var is not None and norm.weight is not None:
            _reduce(norm, digits)


def _reduce(norm: Any, digits: int) -> None:
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    _set(norm.bias, norm.bias.double() - norm.running_mean.double() * scale, digits)
    _set(norm.weight, scale, digits)
    norm.running_mean.zero_()
    # So near to 1 with eps added that the scale comes out of its root as it went in.
    norm.running_var.fill_(1 - norm.eps)


def _set(target: Tensor, value: Tensor, digits: int) -> None:
    values = value.detach().float().cpu().numpy()
    target.copy_(torch.from_numpy(shortened(np.ascontiguousarray(values), digits)))
