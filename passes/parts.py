"""Sums of layers that stand for one layer, as low-rank and structured-sparse approximation leaves them.

A part is a layer, or a layer and a pointwise one behind it (Ma et al., arXiv 1807.10119); each may read some channels
of the common input only. Nothing here is of one exporter: what counts is which operators follow each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm import relay

from .straight_graphs import is_call, operands

LAYERS = ("nn.conv2d", "nn.dense")


@dataclass(frozen=True)
class Gather:
    """Channels taken out of an image or of a row of a matrix.

    Attributes:
        source: of what. channels: their numbers, (count,).
    """

    source: relay.Expr
    channels: NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """One addend.

    Attributes:
        layers: calls of one layer, or of a layer and the pointwise one behind it. biases: what is added behind each,
            as it stands in the graph; None where nothing is.
        gather: what the first layer reads, unless that is the source itself.
    """

    layers: tuple[relay.Call, ...]
    biases: tuple[relay.Constant | None, ...]
    gather: Gather | None

    @property
    def source(self) -> relay.Expr:
        return self.layers[0].args[0] if self.gather is None else self.gather.source


@dataclass(frozen=True)
class Sum:
    """Parts that read one source and whose results are added; a single part is a pair of layers.

    Attributes:
        result: the node whose value the sum is.
    """

    result: relay.Call
    parts: tuple[Part, ...]

    @property
    def source(self) -> relay.Expr:
        return self.parts[0].source

    @property
    def layers(self) -> tuple[relay.Call, ...]:
        """Of all parts."""
        return tuple(layer for part in self.parts for layer in part.layers)


def find_sums(nodes: Sequence[relay.Expr]) -> list[Sum]:
    """The sums of a graph, none within another.

    Args:
        nodes: all of the graph, operands first, with their types.
    """
    finder = _Finder(nodes)
    sums = [found for node in nodes if (found := finder.sum(node)) is not None]
    inner = {layer for one in sums for layer in one.layers}
    return sums + [pair for node in nodes if node not in inner and (pair := finder.lone_pair(node, inner)) is not None]


def gathered(layer: relay.Call) -> Gather | None:
    """The channels that a layer reads, where a ``take`` or ``strided_slice`` of no more than channels is before it."""
    data = layer.args[0]
    if len(data.checked_type.shape) != (2 if is_call(layer, "nn.dense") else 4):
        return None
    if is_call(data, "take"):
        return _taken(data)
    return _sliced(data) if is_call(data, "strided_slice") else None


class _Finder:
    def __init__(self, nodes: Sequence[relay.Expr]) -> None:
        self.uses = Counter(operand for node in nodes for operand in operands(node))

    def sum(self, node: relay.Expr) -> Sum | None:
        """An addition of parts of one source."""
        if not is_call(node, "add"):
            return None
        one, other = (self._part(operand) for operand in node.args)
        if one is None or other is None or not one.source.same_as(other.source):
            return None
        return Sum(node, (one, other)) if one.layers[0].op == other.layers[0].op else None

    def lone_pair(self, node: relay.Expr, inner: set[relay.Call]) -> Sum | None:
        """A pair of layers that is no part of a sum. What its last layer adds stays outside."""
        if not is_call(node, *LAYERS):
            return None
        part = self._layers(node)
        return Sum(node, (part,)) if len(part.layers) == 2 and not inner.intersection(part.layers) else None

    def _part(self, node: relay.Expr) -> Part | None:
        layer, bias = self._without_bias(node)
        if self.uses[node] != 1 or not is_call(layer, *LAYERS):
            return None
        part = self._layers(layer)
        return Part(part.layers, (*part.biases[:-1], bias), part.gather)

    def _layers(self, last: relay.Call) -> Part:
        """Of the last layer, and the one before it if that belongs to the part."""
        first, bias = self._without_bias(last.args[0])
        if _is_pointwise(last) and is_call(first, last.op.name) and self.uses[last.args[0]] == 1:
            return Part((first, last), (bias, None), gathered(first))
        return Part((last,), (None,), gathered(last))

    def _without_bias(self, node: relay.Expr) -> tuple[relay.Expr, relay.Constant | None]:
        """The layer, where that is what a constant is added to and nothing else reads it; else the node itself."""
        if not is_call(node, "add", "nn.bias_add"):
            return node, None
        one, other = node.args
        for layer, constant in ((one, other), (other, one)):
            if is_call(layer, *LAYERS) and self.uses[layer] == 1 and _is_bias(node, constant):
                return layer, constant
        return node, None


def _is_bias(node: relay.Call, constant: relay.Expr) -> bool:
    """Whether the constant is one number for each channel of the node."""
    if not isinstance(constant, relay.Constant):
        return False
    shape, whole = constant.data.shape, [int(size) for size in node.checked_type.shape]
    if is_call(node, "nn.bias_add"):
        return int(node.attrs.axis) in (1, 1 - len(whole))
    behind = len(whole) - 2
    return shape in ((1, whole[1], *(1,) * behind), (whole[1], *(1,) * behind))


def _is_pointwise(layer: relay.Call) -> bool:
    """Whether each output depends on one position of the input."""
    if is_call(layer, "nn.dense"):
        return True
    attrs = layer.attrs
    sizes = [int(size) for name in ("kernel_size", "strides") for size in getattr(attrs, name) or (0,)]
    return set(sizes) == {1} and not any(int(size) for size in attrs.padding)


def _taken(node: relay.Call) -> Gather | None:
    data, indices = node.args
    axis, axes = node.attrs.axis, len(data.checked_type.shape)
    if axis is None or int(axis) % axes != 1 or not isinstance(indices, relay.Constant):
        return None
    channels = indices.data.numpy().astype(np.int64)
    return _gather(data, channels) if channels.ndim == 1 else None


def _sliced(node: relay.Call) -> Gather | None:
    data, attrs = node.args[0], node.attrs
    before, behind = data.checked_type.shape, node.checked_type.shape
    others = [axis for axis in range(len(before)) if axis != 1]
    if len(node.args) > 1 or any(before[axis] != behind[axis] for axis in others):
        return None
    axes = range(len(before)) if attrs.axes is None else [int(axis) % len(before) for axis in attrs.axes]
    places = dict(zip(axes, range(len(attrs.begin)), strict=False))
    if 1 not in places or attrs.slice_mode != "end":
        return None
    steps = [int(step) for step in attrs.strides] or [1]
    step = steps[places[1]] if len(steps) > 1 else steps[0]
    start = int(attrs.begin[places[1]])
    size, count = int(before[1]), int(behind[1])
    first = start + size if start < 0 else start
    return _gather(data, first + step * np.arange(count, dtype=np.int64))


def _gather(source: relay.Expr, channels: NDArray[np.int64]) -> Gather | None:
    size = int(source.checked_type.shape[1])
    return Gather(source, channels) if np.all((channels >= 0) & (channels < size)) else None
