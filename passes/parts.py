"""Sums of layers that stand for one layer, as low-rank and structured-sparse approximation leaves them.

A part is a layer, or a layer and a pointwise one behind it (Ma et al., arXiv 1807.10119); each may read some channels
of the common input only. Nothing here is of one exporter: what counts is which operators follow each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tvm
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
    """The sums of a graph, and the pairs that are in none; no layer is in two of them.

    Args:
        nodes: all of the graph, operands first, with their types.
    """
    finder = _Finder(nodes)
    # The last addition of a sum first, so that it is found as a whole.
    return [found for node in reversed(nodes) if (found := finder.take(node)) is not None][::-1]


def gathered(layer: relay.Call) -> Gather | None:
    """The channels that a layer reads, where a ``take`` or ``strided_slice`` of no more than channels is before it."""
    data = layer.args[0]
    if not is_call(data, "take", "strided_slice"):
        return None
    before = _sizes(data.args[0])
    if before is None or len(before) != _rank(layer) or len(data.checked_type.shape) != len(before):
        return None
    channels = _taken(data, len(before)) if is_call(data, "take") else _sliced(data, before)
    if channels is None or np.any((channels < 0) | (channels >= before[1])):
        return None
    return Gather(data.args[0], channels)


class _Finder:
    def __init__(self, nodes: Sequence[relay.Expr]) -> None:
        self.uses = Counter(operand for node in nodes for operand in operands(node))
        self.taken: set[relay.Expr] = set()

    def take(self, node: relay.Expr) -> Sum | None:
        """The sum or the pair whose result a node is, unless a layer of it has been taken before."""
        found = self._sum(node) or self._pair(node)
        if found is None or not self.taken.isdisjoint(found.layers):
            return None
        self.taken.update(found.layers)
        return found

    def _sum(self, node: relay.Expr) -> Sum | None:
        """An addition of parts of one source."""
        parts = self._addends(node) if is_call(node, "add") else None
        if parts is None:
            return None
        first, *others = parts
        same = all(one.source.same_as(first.source) and one.layers[0].op == first.layers[0].op for one in others)
        return Sum(node, tuple(parts)) if same else None

    def _addends(self, addition: relay.Call) -> list[Part] | None:
        """Of an addition, and of those whose results only it reads; None if any is no part."""
        parts: list[Part] = []
        waiting = list(addition.args)
        while waiting:
            node = waiting.pop(0)
            part = self._part(node)
            if part is not None:
                parts.append(part)
            elif is_call(node, "add") and self.uses[node] == 1:
                waiting += node.args
            else:
                return None
        return parts

    def _pair(self, node: relay.Expr) -> Sum | None:
        """Two layers. What is added to the result of the last stays outside."""
        part = self._layers(node) if is_call(node, *LAYERS) else None
        return Sum(node, (part,)) if part is not None and len(part.layers) == 2 else None

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
            if is_call(layer, *LAYERS) and self.uses[layer] == 1 and _is_bias(node, layer, constant):
                return layer, constant
        return node, None


def _is_bias(node: relay.Call, layer: relay.Call, constant: relay.Expr) -> bool:
    """Whether the constant that a node adds to a layer is one number for each of its channels."""
    sizes = _sizes(layer)
    if not isinstance(constant, relay.Constant) or sizes is None or sizes != _sizes(node):
        return False
    if len(sizes) != _rank(layer):
        return False
    shape, behind = tuple(constant.data.shape), (1,) * (len(sizes) - 2)
    if is_call(node, "nn.bias_add"):
        return shape == (sizes[1],) and int(node.attrs.axis) in (1, 1 - len(sizes))
    return shape in ((1, sizes[1], *behind), (sizes[1], *behind))


def _rank(layer: relay.Call) -> int:
    """Axes of the data that a layer is known to take here."""
    return 2 if is_call(layer, "nn.dense") else 4


def _sizes(node: relay.Expr) -> list[int] | None:
    """The shape of a node's value; None where it is not static."""
    shape = node.checked_type.shape
    return [int(size) for size in shape] if all(isinstance(size, tvm.tir.IntImm) for size in shape) else None


def _is_pointwise(layer: relay.Call) -> bool:
    """Whether each output depends on one position of the input."""
    if is_call(layer, "nn.dense"):
        return True
    attrs = layer.attrs
    sizes = [int(size) for name in ("kernel_size", "strides") for size in getattr(attrs, name) or (0,)]
    return set(sizes) == {1} and not any(int(size) for size in attrs.padding)


def _taken(node: relay.Call, axes: int) -> NDArray[np.int64] | None:
    axis, indices = node.attrs.axis, node.args[1]
    if axis is None or int(axis) % axes != 1 or not isinstance(indices, relay.Constant):
        return None
    channels = indices.data.numpy().astype(np.int64)
    return channels if channels.ndim == 1 else None


def _sliced(node: relay.Call, before: list[int]) -> NDArray[np.int64] | None:
    attrs, behind = node.attrs, _sizes(node)
    if len(node.args) > 1 or behind is None or attrs.slice_mode != "end":
        return None
    axes = range(len(attrs.begin)) if attrs.axes is None else [int(axis) % len(before) for axis in attrs.axes]
    # Strides may be fewer than axes: those of the others are 1.
    strides = [int(stride) for stride in attrs.strides] + [1] * len(axes)
    starts = {axis: (int(start), stride) for axis, start, stride in zip(axes, attrs.begin, strides, strict=False)}
    others = (axis for axis in range(len(before)) if axis != 1)
    if any(behind[axis] != before[axis] or starts.get(axis, (0, 1))[1] != 1 for axis in others):
        return None
    start, stride = starts.get(1, (0, 1))
    return (start + before[1] if start < 0 else start) + stride * np.arange(behind[1], dtype=np.int64)
