"""How a sparse convolution computes, as attributes of its call: decided when the call is made, read when it is built.

Attributes hold the whole geometry, so the type of the result follows from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import tvm

from .direct_plan import DirectPlan, in_one_row
from .epilogues import Activation
from .geometry import ConvGeometry
from .registration import plain, unpack
from .strip_plan import StripPlan
from .tile_images import ImageEnds
from .winograd_plan import WinogradPlan

_DIRECT_PLAN = ("lanes", "rows", "cols", "channels", "panels", "shifted", "packed")
"""Fields of a DirectPlan among the attributes."""

_CHAINED = ("filters", "kernels", "together")
"""Attributes of a chain that have one number for each layer."""

_ACTIVATIONS = ("activations", "lows", "highs")
"""Fields of an Activation, each of all layers of a chain."""


def direct_attributes(geometry: ConvGeometry, plan: DirectPlan) -> dict[str, object]:
    """Of a direct convolution that does not activate.

    Args:
        geometry: not the plan's, if that has the image in one row.
    """
    blocks = {name: getattr(plan, name) for name in _DIRECT_PLAN}
    return {**asdict(geometry), **asdict(Activation()), **blocks}


def direct_plan_of(attrs: tvm.ir.Attrs) -> DirectPlan:
    """How a call of the direct operator computes."""
    geometry = in_one_row(unpack(ConvGeometry, attrs))
    return DirectPlan(geometry, **{name: plain(attrs[name]) for name in _DIRECT_PLAN})


def winograd_attributes(plan: WinogradPlan) -> dict[str, object]:
    """Of a Winograd convolution that does not activate."""
    return {
        **asdict(plan.geometry),
        **asdict(Activation()),
        "tile": plan.layout.m,
        "lanes": plan.layout.lanes,
        "vectors": plan.blocking.vectors,
        "together": plan.blocking.together,
        **asdict(ImageEnds()),
    }


def winograd_plan_of(attrs: tvm.ir.Attrs) -> WinogradPlan:
    """How a call of the Winograd operator computes."""
    numbers = {name: int(attrs[name]) for name in ("tile", "lanes", "vectors", "together")}
    return WinogradPlan.of(unpack(ConvGeometry, attrs), **numbers)


def chain_attributes(
    plan: StripPlan, first_values: Sequence[int], activations: Sequence[Activation]
) -> dict[str, object]:
    """Of a chain.

    Args:
        first_values: where the values of each layer begin.
        activations: of each layer.
    """
    return {
        **asdict(replace(plan.geometry, groups=1)),  # whose filters say by themselves what they read
        "tile": plan.m,
        "lanes": plan.lanes,
        "vectors": plan.layers[0].blocking.vectors,
        "together": [layer.blocking.together for layer in plan.layers],
        "filters": plan.channels[1:],
        "kernels": [layer.geometry.kernel[0] for layer in plan.layers],
        "strip": plan.vectors,
        "parts": plan.parts,
        "first_values": list(first_values),
        "activations": [activation.activation for activation in activations],
        "lows": [activation.low for activation in activations],
        "highs": [activation.high for activation in activations],
    }


def strip_plan_of(attrs: tvm.ir.Attrs) -> StripPlan:
    """How a call of the chain computes."""
    geometry, layers = unpack(ConvGeometry, attrs), []
    tile, lanes, vectors = (int(attrs[name]) for name in ("tile", "lanes", "vectors"))
    for filters, kernel, together in zip(*map(plain, (attrs[name] for name in _CHAINED)), strict=True):
        geometry = replace(geometry, out_channels=filters, kernel=(kernel, kernel), padding=((kernel - 1) // 2,) * 4)
        layers.append(WinogradPlan.of(geometry, tile, lanes, vectors, together))
        geometry = replace(geometry, in_channels=filters)
    return StripPlan(tuple(layers), int(attrs["strip"]), int(attrs["parts"]))


def activations_of(attrs: tvm.ir.Attrs) -> list[Activation]:
    """Of the layers of a chain."""
    return [Activation(*facts) for facts in zip(*(plain(attrs[name]) for name in _ACTIVATIONS), strict=True)]
