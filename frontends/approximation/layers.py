"""A layer to be approximated, and the BatchNorm behind it, as one matrix; and the other way round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .modules import assemble
from .regression import Factors
from .structures import Shape

__all__ = ["Fitted", "Target", "fitted", "put", "target_of"]

_LEAST = 1e-4
"""Of the divisors, relative to the largest factor."""


@dataclass(frozen=True)
class Target:
    """A layer with the BatchNorm behind it: ``factor * (weight x) + bias``.

    Attributes:
        weight: (G, n, p), of the layer. factor, bias: (G, n, 1). divisor: the factor, but not 0 for channels that are
            switched off, which would make the layer's weights infinite.
    """

    weight: Tensor
    factor: Tensor
    bias: Tensor
    divisor: Tensor

    def outputs(self, inputs: Tensor) -> Tensor:
        """Of (G, p, N): (G, n, N)."""
        return self.factor * (self.weight @ inputs) + self.bias


@dataclass(frozen=True)
class Fitted:
    """What takes a layer's place, and its BatchNorm's, where there is one.

    Attributes:
        factors, bias: of the layer; bias None if it has BatchNorm. mean, variance, scale, shift: of the BatchNorm, each
            (channels,), or None.
    """

    factors: Factors
    bias: Tensor | None
    norm: tuple[Tensor, ...] | None


def target_of(module: nn.Module, norm: nn.BatchNorm2d | None, shape: Shape) -> Target:
    """Of a convolution or linear layer."""
    weight = shape.matrices(_parameter(module, "weight"))
    bias = _parameter(module, "bias") if module.bias is not None else weight.new_zeros(len(weight) * weight.shape[1])
    factor = torch.ones_like(bias)
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        deviation = (norm.running_var + norm.eps).sqrt()
        factor = (norm.weight.detach().float() if norm.affine else torch.ones_like(bias)) / deviation
        bias = factor * (bias - norm.running_mean) + (norm.bias.detach().float() if norm.affine else 0)
    least = max(_LEAST * float(factor.abs().max()), torch.finfo(factor.dtype).tiny)
    divisor = torch.where(factor.abs() < least, least, factor)
    each = shape.groups, shape.outputs, 1
    return Target(weight, factor.reshape(each), bias.reshape(each), divisor.reshape(each))


def fitted(target: Target, norm: nn.BatchNorm2d | None, factors: Factors, bias: Tensor, inputs: Tensor) -> Fitted:
    """The layer whose ``factor * (matrices x) + BatchNorm's`` is ``factors x + bias`` in evaluation mode.

    BatchNorm's mean and variance become those of the new outputs, so that training starts where evaluation is.

    Args:
        factors: factor included. inputs: of the layer, (G, p, N).
    """
    own = Factors(
        factors.kept, factors.rest, factors.sparse / target.divisor, factors.expand / target.divisor, factors.reduce
    )
    if norm is None:
        return Fitted(own, bias.squeeze(2), None)
    outputs = own.matrices() @ inputs
    mean, variance = outputs.mean(2, keepdim=True), outputs.var(2, keepdim=True)
    scale = target.divisor * (variance + norm.eps).sqrt()
    shift = bias + target.divisor * mean
    return Fitted(own, None, (mean.flatten(), variance.flatten(), scale.flatten(), shift.flatten()))


def put(model: nn.Module, name: str, norm: str | None, shape: Shape, found: Fitted) -> None:
    """Into the model, in the place of the layer."""
    module = model.get_submodule(name)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, assemble(module, shape, found.factors, found.bias))
    if norm is None or found.norm is None:
        return
    normalised: Any = model.get_submodule(norm)
    values = dict(zip(("running_mean", "running_var", "weight", "bias"), found.norm, strict=True))
    if not normalised.affine:
        normalised.affine = True
        normalised.weight, normalised.bias = (nn.Parameter(torch.empty_like(found.norm[0])) for _ in range(2))
    with torch.no_grad():
        for key, value in values.items():
            getattr(normalised, key).copy_(value)


def _parameter(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value.detach().float()
