"""How a sparse convolution computes, as attributes of its call: decided when the call is made, read when it is built.

Attributes hold the whole geometry, so the type of the result follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple

import tvm

from .direct_plan import DirectPlan, in_one_row
from .epilogues import Activation
from .geometry import ConvGeometry
from .max_pool import PoolGeometry
from .registration import plain, unpack
from .tile_images import ImageEnds
from .winograd_plan import WinogradPlan

_DIRECT_PLAN = ("lanes", "rows", "cols", "channels", "panels", "shifted", "packed", "together", "lifted")
"""Fields of a DirectPlan among the attributes."""

_POOLING = "pooling"


def direct_attributes(geometry: ConvGeometry, plan: DirectPlan) -> dict[str, object]:
    """Of a direct convolution that does not activate.

    Args:
        geometry: not the plan's, if that has the image in one row.
    """
    blocks = {name: getattr(plan, name) for name in _DIRECT_PLAN}
    return {**asdict(geometry), **asdict(Activation()), **blocks, **_pooling(None)}


def pooled_attributes(attributes: Mapping[str, object], pool: PoolGeometry) -> dict[str, object]:
    """Of a direct convolution that pools, from those of one that does not; see why_not_pooled."""
    return {**attributes, **_pooling(pool)}


def pooling_of(attrs: tvm.ir.Attrs) -> PoolGeometry | None:
    """What a call of the direct operator pools by."""
    fields = plain(attrs[_POOLING])
    return PoolGeometry(*zip(fields[::2], fields[1::2], strict=True)) if fields else None


def _pooling(pool: PoolGeometry | None) -> dict[str, object]:
    return {_POOLING: [] if pool is None else [size for pair in astuple(pool) for size in pair]}


def direct_result(attrs: tvm.ir.Attrs) -> tuple[int, int, int, int]:
    """Shape of what a call of the direct operator makes."""
    batch, channels, *size = unpack(ConvGeometry, attrs).out_shape
    pool = pooling_of(attrs)
    return (batch, channels, *(pool.out if pool else size))


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
