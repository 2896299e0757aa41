"""Sums of layers that stand for one layer: that one layer again, where it is faster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, takewhile

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay

from ..schedules.geometry import ConvGeometry
from .alternatives import Alternatives, Planner, Replacement, layer_call, replace_layers
from .gathers import COPY, gather_seconds, scattered, without_gather
from .layers import Layer, Worklist
from .parts import Part, find_sums
from .plan import DENSE


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
        before, merged = self.worklist.notes, dict[str, str]()
        while True:
            # A merged layer may be part of another sum.
            self.worklist.notes, known = {**before, **merged}, len(merged)
            mod = replace_layers(mod, self.planner, partial(self._replacements, merged))
            if len(merged) == known:
                return mod

    def _replacements(
        self, merged: dict[str, str], nodes: list[relay.Expr], alternatives: Alternatives
    ) -> Iterator[tuple[relay.Call, Replacement]]:
        """Args: merged: gets a note on every merged layer, by its name."""
        notes = self.worklist.notes
        for found in find_sums(nodes):
            if not all(call in alternatives.layers for call in found.layers):
                continue
            addends = [_Addend.of(part, [alternatives.layers[call] for call in part.layers]) for part in found.parts]
            whole = _Merged.of([addend for addend in addends if addend is not None])
            if whole is None or None in addends:
                continue
            gain = whole.seconds_apart / whole.seconds(alternatives)
            if gain > 1:
                for name in whole.names:
                    notes.pop(name, None)
                name = next(name for name in _numbered(whole.name) if name not in merged)
                merged[name] = f"one layer again, {gain:.2g} times as fast as its {len(whole.names)} parts"
                yield found.result, Replacement(found.source, partial(whole.call, name))
                continue
            for name in whole.names:
                note = f"part of {whole.name}, which as one layer would take {1 / gain:.2g} times as long"
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

    def nonzeros(self, kernel: str) -> int | None:
        """At most, of the weights by which a sparse kernel multiplies of the layer that the part stands for; None if it
        could be any number."""
        first = self.layers[0]
        if kernel not in first.nonzeros:
            return None
        if len(self.layers) == 1:
            return first.nonzeros[kernel]
        # Both domains are linear in the filters: what is zero in all of the first layer stays so.
        return int(np.count_nonzero(np.any(first.sparse_weight(kernel) != 0, axis=0))) * self.geometry.out_channels

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
        """For the one layer."""
        first = self.addends[0].layers[0]
        nonzeros = {kernel: self._nonzeros(kernel) for kernel in first.nonzeros if kernel != DENSE}
        return alternatives.best(first, self.geometry, nonzeros)[1]

    def _nonzeros(self, kernel: str) -> int:
        weights = Layer("", "", geometry=self.geometry).weights(kernel)
        counts = [addend.nonzeros(kernel) for addend in self.addends]
        return min(weights, sum(weights if count is None else count for count in counts))

    def call(self, name: str, data: relay.Expr) -> relay.Expr:
        """The layer and its bias."""
        first, *others = [addend.filters() for addend in self.addends]
        call = layer_call(self.addends[0].layers[0], sum(others, start=first), data, name)
        biases = [bias for addend in self.addends if (bias := addend.bias()) is not None]
        return call if not biases else relay.nn.bias_add(call, relay.const(np.sum(biases, axis=0).astype(np.float32)))


def _numbered(name: str) -> Iterator[str]:
    """As CollectConvolutions tells layers of one name apart."""
    yield name
    yield from (f"{name}#{number}" for number in count(2))


def _value(layer: Layer) -> NDArray[np.float32]:
    assert layer.weight is not None
    return layer.weight.value


def _product(behind: NDArray[np.float32], filters: NDArray[np.float32], groups: int) -> NDArray[np.float32]:
    """Filters of a layer with a pointwise one behind it, group by group: (n, L / g, 1, 1) times (L, ...)."""
    matrices = behind.reshape(groups, -1, behind.shape[1]).astype(np.float64)
    columns = filters.reshape(groups, behind.shape[1], -1).astype(np.float64)
    return (matrices @ columns).reshape(behind.shape[0], *filters.shape[1:]).astype(np.float32)
