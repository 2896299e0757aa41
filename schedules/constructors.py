"""Calls of the operators, as Relay expressions, and why there may be none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay

from .attributes import direct_attributes, winograd_attributes
from .buffers import argument_buffers, dense_buffers, direct_buffers, why_too_large, winograd_buffers
from .direct_plan import direct_plan
from .formats import BundledRows, SparseRows, idle_positions, pack_dense, pack_direct, pack_winograd
from .geometry import ConvGeometry
from .max_pool import PoolGeometry
from .operators import (
    DENSE_SPARSE,
    DIRECT,
    FROM_TILES,
    MAX_POOL,
    TO_TILES,
    WINOGRAD,
)
from .registration import call
from .sparse_dense import DensePlan, nonzero_group, segment_length
from .targets import cpu_facts
from .tiles import TileLayout
from .winograd import KERNELS, TILES
from .winograd_plan import winograd_plan


def conv2d_sparse_direct(
    data: relay.Expr,
    weight: NDArray[np.floating],
    geometry: ConvGeometry,
    target: tvm.target.Target | str | None = None,
) -> relay.Expr:
    """A sparse direct convolution.

    Args:
        data: (N, C, H, W), float32.
        weight: (K, C / groups, kh, kw); its zeros cost nothing.
        target: whose caches decide the layout of the packed input (the current target, or plain llvm, when None). The
            operator is right for every CPU.

    Raises:
        ValueError: when the geometry is not supported (see why_not_direct) or does not fit the weight.
    """
    _refuse(why_not_direct(geometry, target))
    plan = direct_plan(geometry, cpu_facts(target))
    rows = pack_direct(weight, plan)
    bias = relay.const(np.zeros(geometry.out_channels, np.float32))
    return call(DIRECT, [data, *_constants(rows), bias], **direct_attributes(geometry, plan))


def conv2d_sparse_winograd(
    data: relay.Expr,
    winograd_weight: NDArray[np.floating],
    geometry: ConvGeometry,
    m: int,
    target: tvm.target.Target | str | None = None,
) -> relay.Expr:
    """A sparse Winograd convolution F(m x m, r x r) of an image in NCHW: into tile layout, the convolution, and back.

    Args:
        data: (N, C, H, W), float32.
        winograd_weight: (K, C / groups, n, n), n = m + r - 1: filters in the Winograd domain of winograd.py; zeros
            cost nothing.
        target: whose vectors and caches decide layout and blocks (the current target, or plain llvm, when None). The
            operators are right for every CPU.

    Raises:
        ValueError: when the geometry is not supported (see why_not_winograd) or does not fit the weight.
    """
    _refuse(why_not_winograd(geometry, m, target))
    n = m + geometry.kernel[0] - 1
    if tuple(winograd_weight.shape[2:]) != (n, n):
        raise ValueError(
            f"F({m}x{m}) of a {geometry.kernel[0]}x{geometry.kernel[1]} filter is {n} x {n}, got "
            f"{tuple(winograd_weight.shape)}"
        )
    plan = replace(winograd_plan(geometry, m, cpu_facts(target)), idle=idle_positions(winograd_weight))
    rows = pack_winograd(winograd_weight, plan)
    shape = (geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width)
    tiles = into_tiles(data, shape, plan.layout, plan.offset)
    bias = relay.const(np.zeros(geometry.out_channels, np.float32))
    return out_of_tiles(call(WINOGRAD, [tiles, *_constants(rows), bias], **winograd_attributes(plan)), plan.layout)


def dense_sparse(
    data: relay.Expr,
    weight: NDArray[np.floating],
    batch: int,
    target: tvm.target.Target | str | None = None,
) -> relay.Expr:
    """A sparse fully-connected layer.

    Args:
        data: (batch, C), float32.
        weight: (K, C); its zeros cost nothing.
        target: whose vectors decide how non-zeros are grouped (the current target, or plain llvm, when None). The
            operator is right for every CPU.

    Raises:
        ValueError: when it is too large (see why_not_dense_sparse).
    """
    outputs, inputs = weight.shape
    plan = _dense_plan(batch, inputs, outputs, target)
    _refuse(why_too_large(dense_buffers(plan, cpu_facts(target).lanes)))
    return call(DENSE_SPARSE, [data, *_constants(pack_dense(weight, plan.group, plan.segment))], **asdict(plan))


def into_tiles(
    data: relay.Expr, shape: Sequence[int], layout: TileLayout, offset: tuple[int, int] = (0, 0)
) -> relay.Expr:
    """See tile_conversions.to_tiles; shape: of the data."""
    return call(TO_TILES, [data], **asdict(layout), shape=tuple(shape), offset=offset)


def out_of_tiles(tiles: relay.Expr, layout: TileLayout) -> relay.Expr:
    """See tile_conversions.from_tiles."""
    return call(FROM_TILES, [tiles], **asdict(layout))


def max_pool2d(data: relay.Expr, shape: Sequence[int], geometry: PoolGeometry) -> relay.Expr:
    """Max pooling of float32 images of this shape (N, C, H, W); see max_pool.py."""
    return call(MAX_POOL, [data], shape=tuple(shape), **asdict(geometry))


def why_not_dense_sparse(
    batch: int, inputs: int, outputs: int, target: tvm.target.Target | str | None = None
) -> str | None:
    """Why there is no sparse fully-connected layer of these sizes, or None if there is.

    Args:
        target: as for why_not_direct.
    """
    return why_too_large(dense_buffers(_dense_plan(batch, inputs, outputs, target), cpu_facts(target).lanes))


def why_not_direct(geometry: ConvGeometry, target: tvm.target.Target | str | None = None) -> str | None:
    """Why sparse direct convolution cannot do this geometry, or None if it can.

    Args:
        target: decides the size of buffers (the current target, or plain llvm, when None).
    """
    kh, kw = geometry.kernel
    plan = direct_plan(geometry, cpu_facts(target))
    return why_too_large(argument_buffers(geometry, kh * kw) | direct_buffers(plan))


def why_not_winograd(geometry: ConvGeometry, m: int, target: tvm.target.Target | str | None = None) -> str | None:
    """Why sparse Winograd convolution F(m x m) cannot do this geometry, or None if it can.

    Args:
        target: as for why_not_direct.
    """
    kh, kw = geometry.kernel
    if m not in TILES:
        return f"F({m}x{m}) is not offered, only tiles {', '.join(map(str, TILES))}"
    if kh != kw or kh not in KERNELS:
        return f"filter {kh}x{kw} is outside Winograd's reach ({' or '.join(f'{r}x{r}' for r in KERNELS)})"
    if geometry.strides != (1, 1):
        return f"stride {geometry.strides[0]}x{geometry.strides[1]} is outside Winograd's reach"
    if geometry.dilation != (1, 1):
        return f"dilation {geometry.dilation[0]}x{geometry.dilation[1]} is outside Winograd's reach"
    return why_too_large(argument_buffers(geometry, (m + kh - 1) ** 2)) or why_too_large(
        winograd_buffers(winograd_plan(geometry, m, cpu_facts(target)))
    )


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(reason)


def _constants(rows: SparseRows | BundledRows) -> list[relay.Expr]:
    filters = [rows.filters] if isinstance(rows, BundledRows) else []
    return [relay.const(array) for array in (rows.values, rows.indices, rows.indptr, *filters)]


def _dense_plan(batch: int, inputs: int, outputs: int, target: tvm.target.Target | str | None) -> DensePlan:
    cpu = cpu_facts(target)
    segment = segment_length(batch, inputs, cpu.l1)
    return DensePlan(batch, inputs, outputs, nonzero_group(batch, cpu.lanes), segment)
