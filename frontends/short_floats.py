"""Biases, and what is left of BatchNorm, in few binary digits: coded, they take a third of float32."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .coding.floats import shortened

__all__ = ["shorten_"]

DIGITS = 8
"""Binary digits behind the point: errors of 2^-10 of a number on average, far below those of quantised weights."""


@torch.no_grad()
def shorten_(model: nn.Module, digits: int = DIGITS) -> None:
    """Round biases of convolutions and linear layers, and BatchNorm's scale and shift, in place.

    BatchNorm with running statistics and parameters of its own becomes what it is in evaluation: a scale and a shift,
    its mean 0 and its variance 1. Do not train it further.
    """
    for module in model.modules():
        if isinstance(module, (_ConvNd, nn.Linear)) and isinstance(module.bias, nn.Parameter):
            _set(module.bias, module.bias, digits)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.weight is not None]
    owners = Counter(id(parameter) for norm in norms for parameter in (norm.weight, norm.bias))
    for norm in norms:
        if norm.running_var is not None and owners[id(norm.weight)] == owners[id(norm.bias)] == 1:
            _reduce(norm, digits)


def _reduce(norm: Any, digits: int) -> None:
    mean, shift = norm.running_mean.double(), norm.bias.double()
    _set(norm.weight, norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt(), digits)
    # By the rounded scale: what is at the mean stays where it was.
    _set(norm.bias, shift - mean * norm.weight.double(), digits)
    norm.running_mean.zero_()
    # So near to 1 with eps added that the scale comes out of its root as it went in.
    norm.running_var.fill_(1 - norm.eps)


def _set(target: Tensor, value: Tensor, digits: int) -> None:
    values = value.detach().float().cpu().numpy()
    target.copy_(torch.from_numpy(shortened(np.ascontiguousarray(values), digits)))
