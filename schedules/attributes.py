"""How a sparse convolution computes, as attributes of its call: decided when the call is made, read when it is built.

Attributes hold the whole geometry, so the type of the result follows from them.
"""

from __future__ import annotations

from dataclasses import asdict

import tvm

from .direct_plan import DirectPlan, in_one_row
from .epilogues import Activation
from .geometry import ConvGeometry
from .registration import plain, unpack
from .tile_images import ImageEnds
from .winograd_plan import WinogradPlan

_DIRECT_PLAN = ("lanes", "rows", "cols", "channels", "panels", "shifted", "packed", "together")
"""Fields of a DirectPlan among the attributes."""


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
        "blocks": plan.blocking.blocks,
        "together": plan.blocking.together,
        "idle": list(plan.idle),
        **asdict(ImageEnds()),
    }


def winograd_plan_of(attrs: tvm.ir.Attrs) -> WinogradPlan:
    """How a call of the Winograd operator computes."""
    numbers = {name: int(attrs[name]) for name in ("tile", "lanes", "blocks", "together")}
    return WinogradPlan.of(unpack(ConvGeometry, attrs), **numbers, idle=plain(attrs["idle"]))
