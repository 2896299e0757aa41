"""Approximated layers as ordinary modules: they train, export to ONNX, and their parts are layers like all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .regression import Factors
from .structures import Shape

__all__ = ["HeldConv2d", "SparseLowRank", "assemble"]


class HeldConv2d(nn.Conv2d):
    """A convolution some of whose columns, taps of input channels, stay zero in training.

    Attributes:
        held: whether a weight is held at zero, of the weight's shape.
    """

    held: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("held", torch.zeros_like(self.weight, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """As of any convolution; in training, zeros that an optimiser has moved are zero again first."""
        if self.training:
            with torch.no_grad():
                self.weight.masked_fill_(self.held, 0)
        return super().forward(x)


class SparseLowRank(nn.Module):
    """The sum of a layer of some input channels and of a low-rank pair of the others.

    Attributes:
        kept, rest: numbers of input channels of the two parts, None where a part has all of them or is missing.
        sparse: a convolution or linear layer of the kept channels, or None.
        reduce, expand: one of the others to the rank, and a pointwise one from there, or None.

    The bias is ``expand``'s, or else ``sparse``'s. After Ma et al., arXiv 1807.10119, where the pair has all channels.
    It needs none of those kept: what it could say of them the kept weights say as well.
    """

    kept: Tensor | None
    rest: Tensor | None

    def __init__(
        self, sparse: nn.Module | None, reduce: nn.Module | None, expand: nn.Module | None, dim: int, **channels: Any
    ) -> None:
        super().__init__()
        self.sparse, self.reduce, self.expand, self.dim = sparse, reduce, expand, dim
        self.register_buffer("kept", channels.get("kept"))
        self.register_buffer("rest", channels.get("rest"))

    def forward(self, x: Tensor) -> Tensor:
        """As of the layer that this stands for."""
        parts = []
        if self.expand is not None and self.reduce is not None:
            parts.append(self.expand(self.reduce(self._of(x, self.rest))))
        if self.sparse is not None:
            parts.append(self.sparse(self._of(x, self.kept)))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _of(self, x: Tensor, channels: Tensor | None) -> Tensor:
        return x if channels is None else x.index_select(self.dim, channels)


def assemble(module: nn.Module, shape: Shape, factors: Factors, bias: Tensor | None) -> SparseLowRank:
    """A module in the place of a convolution or linear layer.

    Args:
        factors: of its matrices. bias: (G, n), or None.
    """
    has_pair, has_own = factors.reduce.shape[1] > 0, factors.kept.shape[1] > 0
    numbers = torch.arange(shape.groups, device=factors.kept.device)[:, None] * shape.channels

    def part(weight: Tensor, columns: Tensor, rows: int, own_bias: Tensor | None) -> tuple[nn.Module, Tensor | None]:
        """A layer of some columns, and the numbers of its channels unless it has all."""
        if columns.shape[1] == shape.columns:
            return _like(module, shape, shape.channels, rows, weight, own_bias), None
        if not shape.by_column:
            channels = columns[:, :: shape.unit] // shape.unit
            layer = _like(module, shape, channels.shape[1], rows, weight, own_bias)
            return layer, (channels + numbers).reshape(-1)
        return _held(module, shape, rows, weight, columns, own_bias), None

    reduce = expand = sparse = kept = rest = None
    if has_pair:
        reduce, rest = part(factors.reduce, factors.rest, factors.reduce.shape[1], None)
        expand = _pointwise(module, shape, factors.expand, bias)
    if has_own or not has_pair:
        sparse, kept = part(factors.sparse, factors.kept, shape.outputs, None if has_pair else bias)
    made = SparseLowRank(sparse, reduce, expand, -1 if isinstance(module, nn.Linear) else 1, kept=kept, rest=rest)
    return made.to(_weight(module)).train(module.training)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _like(
    module: nn.Module,
    shape: Shape,
    channels: int,
    rows: int,
    weight: Tensor,
    bias: Tensor | None,
    kind: Any = nn.Conv2d,
) -> nn.Module:
    """A layer as ``module``, of other sizes."""
    if isinstance(module, nn.Linear):
        layer: Any = nn.Linear(channels, rows, bias is not None)
    else:
        assert isinstance(module, nn.Conv2d)
        layer = kind(
            shape.groups * channels,
            shape.groups * rows,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            shape.groups,
            bias is not None,
            module.padding_mode,
        )
    return _filled(layer, weight, bias)


def _held(
    module: nn.Module, shape: Shape, rows: int, weight: Tensor, columns: Tensor, bias: Tensor | None
) -> nn.Module:
    """All channels, but only some columns that are not zero."""
    whole = weight.new_zeros(shape.groups, rows, shape.columns)
    index = columns[:, None, :].expand(-1, rows, -1)
    held = torch.ones_like(whole, dtype=torch.bool).scatter_(2, index, False)
    layer = _like(module, shape, shape.channels, rows, whole.scatter_(2, index, weight), bias, HeldConv2d)
    assert isinstance(layer, HeldConv2d)
    layer.held.copy_(held.reshape(layer.held.shape))
    return layer


def _pointwise(module: nn.Module, shape: Shape, weight: Tensor, bias: Tensor | None) -> nn.Module:
    rank, has_bias = weight.shape[2], bias is not None
    if isinstance(module, nn.Linear):
        return _filled(nn.Linear(rank, shape.outputs, has_bias), weight, bias)
    outputs = shape.groups * shape.outputs
    return _filled(nn.Conv2d(shape.groups * rank, outputs, 1, groups=shape.groups, bias=has_bias), weight, bias)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if bias is not None:
            layer.bias.copy_(bias.reshape(-1))
    return layer
