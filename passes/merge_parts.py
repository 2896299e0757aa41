"""Sums of layers that stand for one layer: that one layer again, where it is faster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay

from ..schedules.geometry import ConvGeometry
from .alternatives import (
    COPY,
    Alternatives,
    Planner,
    Replacement,
    Replacer,
    gather_seconds,
    layer_call,
    scattered,
    without_gather,
)
from .layers import Layer, Worklist
from .parts import LAYERS, Part, find_sums
from .plan import DIRECT
from .straight_graphs import rewrite_straight


@tvm.transform.module_pass(opt_level=0, name="MergeParts")
class MergeParts:
    """Put one convolution or fully-connected layer for a sum of several that stands for it, where that is predicted to
    be faster.

    A sum is as ``parts`` describes it: what ``frontends.approximate`` leaves (Ma et al., arXiv 1807.10119), or another
    low-rank factorisation. A ``@main`` with control flow or functions inside is handed back unchanged, and so are
    layers with Winograd thresholds of the model's own.

    Args:
        worklist: gets a note on every layer of a sum.
        planner: how kernels will be chosen.
    """

    def __init__(self, worklist: Worklist, planner: Planner) -> None:
        self.worklist = worklist
        self.planner = planner

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        def replacer(nodes: list[relay.Expr]) -> Replacer:
            return Replacer(dict(self._replacements(nodes, Alternatives(mod, nodes, self.planner))), nodes)

        return rewrite_straight(mod, LAYERS, replacer)

    def _replacements(
        self, nodes: list[relay.Expr], alternatives: Alternatives
    ) -> Iterator[tuple[relay.Call, Replacement]]:
        for found in find_sums(nodes):
            if not all(call in alternatives.layers for call in found.layers):
                continue
            addends = [_Addend.of(part, [alternatives.layers[call] for call in part.layers]) for part in found.parts]
            merged = _Merged.of([addend for addend in addends if addend is not None])
            if merged is None or None in addends:
                continue
            gain = merged.seconds_apart / merged.seconds(alternatives)
            self._note(merged, gain)
            if gain > 1:
                yield found.result, Replacement(found.source, merged.call)

    def _note(self, merged: _Merged, gain: float) -> None:
        notes, names = self.worklist.notes, merged.names
        if gain > 1:
            for name in names:
                notes.pop(name, None)
            notes[merged.name] = f"one layer again, {gain:.2g} times as fast as its {len(names)} parts"
            return
        for name in names:
            note = f"part of {merged.name}, which as one layer would take {1 / gain:.2g} times as long"
            notes[name] = f"{notes[name]}; {note}" if name in notes else note


@dataclass(frozen=True)
class _Addend:
    """A part, and what is known of its layers.

    Attributes:
        geometry: of the layer that the part stands for.
    """

    part: Part
    layers: list[Layer]
    geometry: ConvGeometry

    @classmethod
    def of(cls, part: Part, layers: list[Layer]) -> _Addend | None:
        """None for a part that stands for no single layer."""
        own, last = layers[0].geometry, layers[-1].geometry
        assert own is not None
        assert last is not None
        geometry = own if part.gather is None else without_gather(own, part.gather)
        if geometry is None or last.groups != own.groups:
            return None
        return cls(part, layers, replace(geometry, out_channels=last.out_channels))

    @property
    def seconds(self) -> float:
        """As chosen, the copy of channels included."""
        copy = 0.0 if self.part.gather is None else gather_seconds(self.layers[0], self.part.gather)
        return copy + sum(layer.costs[layer.kernel] for layer in self.layers)

    @property
    def nonzeros(self) -> int:
        """At most, of the weights of the layer that the part stands for."""
        weight = _value(self.layers[0])
        if len(self.layers) == 1:
            return int(np.count_nonzero(weight))
        return int(np.count_nonzero(np.any(weight != 0, axis=0))) * self.geometry.out_channels

    def filters(self) -> NDArray[np.float32]:
        """Of the layer that the part stands for."""
        filters = _value(self.layers[0])
        if len(self.layers) == 2:
            filters = _product(_value(self.layers[1]), filters, self.geometry.groups)
        return filters if self.part.gather is None else scattered(filters, self.geometry, self.part.gather)

    def bias(self) -> NDArray[np.float64] | None:
        """Of the layer that the part stands for; None where it has none."""
        first, last = self.part.biases[0], self.part.biases[-1]
        own: NDArray[np.float64] | None = None if last is None else last.data.numpy().reshape(-1).astype(np.float64)
        if len(self.layers) == 1 or first is None:
            return own
        column = first.data.numpy().reshape(-1, 1, 1, 1)
        through = _product(_value(self.layers[1]), column, self.geometry.groups).reshape(-1).astype(np.float64)
        return through if own is None else own + through


@dataclass(frozen=True)
class _Merged:
    """The layer that a sum stands for."""

    addends: list[_Addend]
    geometry: ConvGeometry

    @classmethod
    def of(cls, addends: list[_Addend]) -> _Merged | None:
        """None where the parts differ in more than the channels that they read."""
        geometries = {addend.geometry for addend in addends}
        return cls(addends, geometries.pop()) if len(geometries) == 1 else None

    @property
    def names(self) -> list[str]:
        """Of all layers of the sum."""
        return [layer.name for addend in self.addends for layer in addend.layers]

    @property
    def name(self) -> str:
        """What the names of the layers begin with, by whole words; else all of them."""
        words = zip(*(re.split("[./]", name.strip("/")) for name in self.names), strict=False)
        common = takewhile(lambda same: len(set(same)) == 1, words)
        return ".".join(word for word, *_ in common) or "+".join(self.names)

    @property
    def seconds_apart(self) -> float:
        """For the parts and to add their results."""
        outputs = int(np.prod(self.geometry.out_shape))
        return sum(addend.seconds for addend in self.addends) + COPY * outputs * (len(self.addends) - 1)

    def seconds(self, alternatives: Alternatives) -> float:
        """For the one layer. Its Winograd weights are pruned like those of the first part."""
        first = self.addends[0].layers[0]
        whole = Layer("", first.op, geometry=self.geometry)
        nonzeros = {kernel: round(whole.weights(kernel) * (1 - first.sparsity(kernel))) for kernel in first.nonzeros}
        nonzeros[DIRECT] = min(whole.weights(DIRECT), sum(addend.nonzeros for addend in self.addends))
        return alternatives.best(first, self.geometry, nonzeros)[1]

    def call(self, data: relay.Expr) -> relay.Expr:
        """The layer and its bias."""
        first, *others = [addend.filters() for addend in self.addends]
        call = layer_call(self.addends[0].layers[0], sum(others, start=first), data, self.name)
        biases = [bias for addend in self.addends if (bias := addend.bias()) is not None]
        return call if not biases else relay.nn.bias_add(call, relay.const(np.sum(biases, axis=0).astype(np.float32)))


def _value(layer: Layer) -> NDArray[np.float32]:
    assert layer.weight is not None
    return layer.weight.value


def _product(behind: NDArray[np.float32], filters: NDArray[np.float32], groups: int) -> NDArray[np.float32]:
    """Filters of a layer with a pointwise one behind it, group by group: (n, L / g, 1, 1) times (L, ...)."""
    matrices = behind.reshape(groups, -1, behind.shape[1]).astype(np.float64)
    columns = filters.reshape(groups, behind.shape[1], -1).astype(np.float64)
    return (matrices @ columns).reshape(behind.shape[0], *filters.shape[1:]).astype(np.float32)
