"""Layers that read some channels of an image: zero weights for the others in place of a copy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import tvm
from tvm import relay

from .alternatives import Alternatives, Replacement, ReplacingPass, layer_call
from .gathers import gather_seconds, scattered, without_gather
from .layers import Layer
from .parts import LAYERS, Gather, gathered
from .plan import DENSE
from .straight_graphs import is_call

NOTE = "zero weights for the channels that it does not read, in place of a copy of the others"


@tvm.transform.module_pass(opt_level=0, name="AbsorbGathers")
class AbsorbGathers(ReplacingPass):
    """Let a layer read an image as it is, with zero weights, where it reads channels taken out of that image, a sparse
    kernel will run it and that is predicted to be faster than the copy.

    A ``@main`` with control flow or functions inside is handed back unchanged, and so are layers with Winograd
    thresholds of the model's own.

    Args:
        worklist: gets a note on every layer so changed.
        planner: how kernels will be chosen.
    """

    def replacements(
        self, nodes: list[relay.Expr], alternatives: Alternatives
    ) -> Iterator[tuple[relay.Call, Replacement]]:
        """For each layer to be changed."""
        for node in nodes:
            found = gathered(node) if is_call(node, *LAYERS) else None
            layer = None if found is None else alternatives.layers.get(node)
            if found is None or layer is None:
                continue
            replacement = _replacement(layer, found, alternatives)
            if replacement is not None:
                self.worklist.notes[layer.name] = NOTE
                yield node, replacement


def _replacement(layer: Layer, found: Gather, alternatives: Alternatives) -> Replacement | None:
    """None to leave the layer as it is."""
    assert layer.geometry is not None
    assert layer.weight is not None
    geometry = without_gather(layer.geometry, found)
    if geometry is None:
        return None
    kernel, seconds = alternatives.best(layer, geometry, layer.nonzeros)
    if kernel == DENSE or seconds >= layer.costs[layer.kernel] + gather_seconds(layer, found):
        return None
    filters = scattered(layer.weight.value, geometry, found)
    return Replacement(found.source, partial(layer_call, layer, filters))
