"""Pairs of layers: as many channels between them as vectors have lanes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay

from ..schedules.targets import cpu_facts
from .alternatives import Alternatives, Replacement, ReplacingPass, layer_call
from .layers import Layer
from .parts import Part, find_sums
from .plan import DENSE


@tvm.transform.module_pass(opt_level=0, name="PadPairs")
class PadPairs(ReplacingPass):
    """Give the pairs of layers in sums more channels in between, of zero weights, where their number does not suit
    TVM's dense kernels.

    Those compute as many output channels at a time as the largest divisor of their number that fits a vector: 53
    channels one by one (448 to 53 channels, 3x3, 28x28, AVX-512: 21.0 ms), 64 by sixteen (4.1 ms). Only where such a
    kernel is chosen for the first layer, and without groups; pairs with Winograd thresholds of the model's own stay as
    they are.

    Args:
        worklist: gets a note on every layer so changed.
        planner: how kernels will be chosen.
    """

    def replacements(
        self, nodes: list[relay.Expr], alternatives: Alternatives
    ) -> Iterator[tuple[relay.Call, Replacement]]:
        """For each layer to be changed."""
        lanes = cpu_facts(self.planner.target).lanes
        for part in (part for found in find_sums(nodes) for part in found.parts):
            if len(part.layers) == 1 or not all(call in alternatives.layers for call in part.layers):
                continue
            first, last = (alternatives.layers[call] for call in part.layers)
            assert first.geometry is not None
            assert last.geometry is not None
            before = first.geometry.out_channels
            channels = suitable(before, lanes)
            if first.kernel == DENSE and first.geometry.groups == last.geometry.groups == 1 and channels > before:
                self.worklist.notes[first.name] = f"{before} filters, and {channels - before} of zeros to fill vectors"
                yield part.layers[-1], _padded(part, first, last, channels)


def suitable(channels: int, lanes: int) -> int:
    """The number of channels, at least so many, that takes the fewest vectors when each has as many lanes as the
    largest power of two that divides it and fits."""
    return min(range(channels, -(-channels // lanes) * lanes + 1), key=lambda count: count // _lanes(count, lanes))


def _lanes(channels: int, lanes: int) -> int:
    return min(channels & -channels, lanes)


def _padded(part: Part, first: Layer, last: Layer, channels: int) -> Replacement:
    """Of a pair; the bias in between, too."""
    assert first.weight is not None
    assert last.weight is not None
    before = _to(first.weight.value, channels, axis=0)
    behind = _to(last.weight.value, channels, axis=1)
    bias = part.biases[0]

    def make(data: relay.Expr) -> relay.Expr:
        between = layer_call(first, before, data)
        if bias is not None:
            between = relay.nn.bias_add(between, relay.const(_to(bias.data.numpy().reshape(-1), channels, axis=0)))
        return layer_call(last, behind, between)

    return Replacement(part.layers[0].args[0], make)


def _to(array: NDArray[np.float32], length: int, axis: int) -> NDArray[np.float32]:
    """With zeros behind, along an axis."""
    widths = [(0, length - array.shape[axis] if place == axis else 0) for place in range(array.ndim)]
    return np.pad(array, widths)
