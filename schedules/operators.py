"""The sparse layers as Relay expressions; importing this module registers their operators and readies LLVM.

``jointsparse.conv2d_sparse_direct`` takes data, three constants (values, indices, indptr: SparseRows of formats.py) and
a bias, in its form ``..._add`` a residual as well, which it adds before it activates; NCHW, float32.
``jointsparse.conv2d_sparse_winograd`` does the same with images in tile layout, into and out of which
``jointsparse.to_tiles`` and ``jointsparse.from_tiles`` bring them; its four constants are BundledRows.
``jointsparse.winograd_chain`` is several of these, one after the other, of images NCHW.
``jointsparse.dense_sparse`` is otherwise like ``nn.dense``: what may follow it is fused into it.
Attributes hold the whole geometry, so the type of the result follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay, te

from . import cpu_dense, llvm_workaround
from .buffers import argument_buffers, dense_buffers, direct_buffers, why_too_large, winograd_buffers
from .convolution_buffers import Arguments
from .direct_plan import DirectPlan, direct_plan, in_one_row
from .epilogues import Activation
from .formats import BundledRows, SparseRows, pack_dense, pack_direct, pack_winograd
from .geometry import ConvGeometry
from .max_pool import PoolGeometry
from .max_pool import max_pool2d as max_pool2d_compute
from .registration import OtherShape, call, plain, register, unpack
from .sparse_dense import DensePlan, nonzero_group, segment_length, sparse_dense
from .sparse_direct import sparse_direct
from .sparse_winograd import sparse_winograd
from .strip_plan import StripPlan
from .targets import cpu_facts, gathers_fast
from .tile_conversions import from_tiles, to_tiles
from .tiles import TileLayout
from .winograd import KERNELS, TILES
from .winograd_chain import winograd_chain as winograd_chain_compute
from .winograd_plan import WinogradPlan, winograd_plan

__all__ = [
    "DENSE_SPARSE",
    "DIRECT",
    "DIRECT_ADD",
    "FROM_TILES",
    "MAX_POOL",
    "TO_TILES",
    "WINOGRAD",
    "WINOGRAD_ADD",
    "WINOGRAD_CHAIN",
    "WINOGRAD_CHAIN_ADD",
    "conv2d_sparse_direct",
    "conv2d_sparse_winograd",
    "dense_sparse",
    "max_pool2d",
    "why_not_dense_sparse",
    "why_not_direct",
    "why_not_winograd",
    "winograd_chain",
]

DIRECT = "jointsparse.conv2d_sparse_direct"
DIRECT_ADD = "jointsparse.conv2d_sparse_direct_add"
WINOGRAD = "jointsparse.conv2d_sparse_winograd"
WINOGRAD_ADD = "jointsparse.conv2d_sparse_winograd_add"
WINOGRAD_CHAIN = "jointsparse.winograd_chain"
WINOGRAD_CHAIN_ADD = "jointsparse.winograd_chain_add"
TO_TILES = "jointsparse.to_tiles"
FROM_TILES = "jointsparse.from_tiles"
MAX_POOL = "jointsparse.max_pool2d"
DENSE_SPARSE = "jointsparse.dense_sparse"


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
    blocks = {name: getattr(plan, name) for name in _DIRECT_PLAN}
    return call(DIRECT, [data, *_constants(rows), bias], **asdict(geometry), **asdict(Activation()), **blocks)


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
    plan = winograd_plan(geometry, m, cpu_facts(target))
    rows = pack_winograd(winograd_weight, plan)
    shape = (geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width)
    tiles = into_tiles(data, shape, plan.layout, plan.offset)
    bias = relay.const(np.zeros(geometry.out_channels, np.float32))
    attributes = {**asdict(geometry), **asdict(Activation()), "tile": m, "lanes": plan.layout.lanes}
    attributes |= {"vectors": plan.blocking.vectors, "together": plan.blocking.together}
    arguments = [tiles, *_constants(rows), relay.const(rows.filters), bias]
    return out_of_tiles(call(WINOGRAD, arguments, **attributes), plan.layout)


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
    return [relay.const(array) for array in (rows.values, rows.indices, rows.indptr)]


def direct_plan_of(attrs: tvm.ir.Attrs) -> DirectPlan:
    """How a call of the direct operator computes, as decided when it was made."""
    geometry = in_one_row(unpack(ConvGeometry, attrs))
    return DirectPlan(geometry, **{name: plain(attrs[name]) for name in _DIRECT_PLAN})


_DIRECT_PLAN = ("lanes", "rows", "cols", "channels", "panels", "shifted", "packed")
"""Fields of a DirectPlan among the attributes."""


def _dense_plan(batch: int, inputs: int, outputs: int, target: tvm.target.Target | str | None) -> DensePlan:
    cpu = cpu_facts(target)
    segment = segment_length(batch, inputs, cpu.l1)
    return DensePlan(batch, inputs, outputs, nonzero_group(batch, cpu.lanes), segment)


def _compute_dense(attrs: tvm.ir.Attrs, inputs: Mapping[str, te.Tensor], target: tvm.target.Target) -> te.Tensor:
    plan, lanes = unpack(DensePlan, attrs), cpu_facts(target).lanes
    _refuse(why_too_large(dense_buffers(plan, lanes)))
    return sparse_dense(
        **inputs, plan=plan, lanes=lanes, gather=gathers_fast(target), prefetch=target.kind.name == "llvm"
    )


def _compute_direct(attrs: tvm.ir.Attrs, inputs: Mapping[str, te.Tensor], target: tvm.target.Target) -> te.Tensor:
    return sparse_direct(
        Arguments(**inputs),
        plan=direct_plan_of(attrs),
        shape=unpack(ConvGeometry, attrs).out_shape,
        activation=unpack(Activation, attrs),
    )


def winograd_plan_of(attrs: tvm.ir.Attrs) -> WinogradPlan:
    """How a call of the Winograd operator computes, as decided when it was made."""
    numbers = {name: int(attrs[name]) for name in ("tile", "lanes", "vectors", "together")}
    return WinogradPlan.of(unpack(ConvGeometry, attrs), **numbers)


def _compute_winograd(attrs: tvm.ir.Attrs, inputs: Mapping[str, te.Tensor], target: tvm.target.Target) -> te.Tensor:
    return sparse_winograd(
        Arguments(**inputs),
        plan=winograd_plan_of(attrs),
        activation=unpack(Activation, attrs),
        prefetch=target.kind.name == "llvm",
    )


def winograd_chain(
    data: relay.Expr, calls: Sequence[relay.Call], plan: StripPlan, residual: relay.Expr | None
) -> relay.Expr:
    """Calls of the Winograd operators, one after the other, as one of images NCHW.

    Args:
        data: NCHW, in the place of the first call's data.
        calls: of layers that strip_plan takes; their arguments behind the data are constants.
        plan: of these calls.
        residual: NCHW, in the place of the last call's.
    """
    weights = [[argument.data.numpy() for argument in one.args[1:6]] for one in calls]
    arguments = [np.concatenate(arrays) for arrays in zip(*weights, strict=True)]
    lengths = [len(values) for values, *_ in weights]
    activations = [unpack(Activation, one.attrs) for one in calls]
    attributes = {
        **asdict(replace(plan.geometry, groups=1)),  # whose filters say by themselves what they read
        "tile": plan.m,
        "lanes": plan.lanes,
        "vectors": plan.layers[0].blocking.vectors,
        "together": [layer.blocking.together for layer in plan.layers],
        "filters": plan.channels[1:],
        "kernels": [layer.geometry.kernel[0] for layer in plan.layers],
        "strip": plan.vectors,
        "parts": plan.parts,
        "first_values": [sum(lengths[:i]) for i in range(len(lengths))],
        "activations": [activation.activation for activation in activations],
        "lows": [activation.low for activation in activations],
        "highs": [activation.high for activation in activations],
    }
    everything = [data, *map(relay.const, arguments), *([] if residual is None else [residual])]
    return call(WINOGRAD_CHAIN if residual is None else WINOGRAD_CHAIN_ADD, everything, **attributes)


def strip_plan_of(attrs: tvm.ir.Attrs) -> StripPlan:
    """How a call of the chain computes, as decided when it was made."""
    geometry, layers = unpack(ConvGeometry, attrs), []
    tile, lanes, vectors = (int(attrs[name]) for name in ("tile", "lanes", "vectors"))
    for filters, kernel, together in zip(*map(plain, (attrs[name] for name in _CHAINED)), strict=True):
        geometry = replace(geometry, out_channels=filters, kernel=(kernel, kernel), padding=((kernel - 1) // 2,) * 4)
        layers.append(WinogradPlan.of(geometry, tile, lanes, vectors, together))
        geometry = replace(geometry, in_channels=filters)
    return StripPlan(tuple(layers), int(attrs["strip"]), int(attrs["parts"]))


_CHAINED = ("filters", "kernels", "together")
"""Attributes of a chain that have one number for each layer."""


def _compute_chain(attrs: tvm.ir.Attrs, inputs: Mapping[str, te.Tensor], target: tvm.target.Target) -> te.Tensor:
    numbers = zip(*(plain(attrs[name]) for name in ("activations", "lows", "highs")), strict=True)
    return winograd_chain_compute(
        Arguments(**inputs),
        plan=strip_plan_of(attrs),
        first_values=plain(attrs["first_values"]),
        activations=[Activation(*facts) for facts in numbers],
        prefetch=target.kind.name == "llvm",
    )


def _chain_result(attrs: tvm.ir.Attrs, data: Sequence[int]) -> Sequence[int]:
    return data[0], plain(attrs["filters"])[-1], data[2], data[3]


def _as_it_is(attrs: tvm.ir.Attrs, outs: Sequence[te.Tensor], target: tvm.target.Target) -> te.Schedule:
    """Of what is TIR already."""
    return te.create_schedule([out.op for out in outs])


def _nchw(attrs: tvm.ir.Attrs, data: Sequence[int | None]) -> Sequence[int | None]:
    geometry = unpack(ConvGeometry, attrs)
    return geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width


def _winograd_source(attrs: tvm.ir.Attrs, data: Sequence[int | None]) -> Sequence[int | None]:
    plan = winograd_plan_of(attrs)
    return plan.layout.shape(plan.geometry.batch, plan.geometry.in_channels)


def _winograd_result(attrs: tvm.ir.Attrs, data: Sequence[int]) -> Sequence[int]:
    plan = winograd_plan_of(attrs)
    return plan.layout.shape(plan.geometry.batch, plan.geometry.out_channels)


def _images_in_tiles(attrs: tvm.ir.Attrs, data: Sequence[int | None]) -> Sequence[int | None]:
    """Of any two sizes first."""
    layout = unpack(TileLayout, attrs)
    return [*[*data, None, None][:2], layout.length]


def _image_shape(attrs: tvm.ir.Attrs, data: Sequence[int]) -> Sequence[int]:
    layout = unpack(TileLayout, attrs)
    return data[0], data[1], layout.height, layout.width


_WEIGHTS = {
    "values": "non-zeros, row after row",
    "indices": "where the operand of each non-zero lies",
    "indptr": "start of each row",
}
_CONVOLUTION = {"data": "input", **_WEIGHTS, "bias": "of each filter"}
_WINOGRAD = {"data": "input", **_WEIGHTS, "filters": "filter of each row", "bias": "of each filter"}
_RESIDUAL = {"residual": "of the shape of the result"}
_BIAS: dict[str, OtherShape] = {"bias": lambda result: result[1:2]}
_BIAS_AND_RESIDUAL: dict[str, OtherShape] = {**_BIAS, "residual": lambda result: result}

for _name, _arguments, _others in (
    (DIRECT, _CONVOLUTION, _BIAS),
    (DIRECT_ADD, _CONVOLUTION | _RESIDUAL, _BIAS_AND_RESIDUAL),
):
    register(
        _name,
        "Sparse direct convolution of images NCHW, bias, residual and activation.",
        _arguments,
        _nchw,
        lambda attrs, data: unpack(ConvGeometry, attrs).out_shape,
        _compute_direct,
        _as_it_is,
        other_shapes=_others,
    )
for _name, _arguments, _others in (
    (WINOGRAD, _WINOGRAD, _BIAS),
    (WINOGRAD_ADD, _WINOGRAD | _RESIDUAL, _BIAS_AND_RESIDUAL),
):
    register(
        _name,
        "Sparse Winograd convolution of images in tile layout, bias, residual and activation.",
        _arguments,
        _winograd_source,
        _winograd_result,
        _compute_winograd,
        _as_it_is,
        other_shapes=_others,
    )
for _name, _arguments, _others in (
    (WINOGRAD_CHAIN, _WINOGRAD, {}),
    (WINOGRAD_CHAIN_ADD, _WINOGRAD | _RESIDUAL, {"residual": lambda result: result}),
):
    register(
        _name,
        "Sparse Winograd convolutions of images NCHW one after the other.",
        _arguments,
        _nchw,
        _chain_result,
        _compute_chain,
        _as_it_is,
        other_shapes=_others,
    )
register(
    DENSE_SPARSE,
    "Sparse fully-connected layer.",
    {"data": "input, (batch, inputs)", **_WEIGHTS},
    lambda attrs, data: (int(attrs["batch"]), int(attrs["inputs"])),
    lambda attrs, data: (int(attrs["batch"]), int(attrs["outputs"])),
    _compute_dense,
    lambda attrs, outs, target: cpu_dense.schedule_dense(outs, target),
    fusable=True,
)
register(
    TO_TILES,
    "Images into tile layout.",
    {"data": "images, NCHW"},
    lambda attrs, data: plain(attrs["shape"]),
    lambda attrs, data: unpack(TileLayout, attrs).shape(data[0], data[1]),
    lambda attrs, inputs, target: to_tiles(inputs["data"], unpack(TileLayout, attrs), plain(attrs["offset"])),
    _as_it_is,
)
register(
    FROM_TILES,
    "Images out of tile layout.",
    {"data": "images in tile layout"},
    _images_in_tiles,
    _image_shape,
    lambda attrs, inputs, target: from_tiles(inputs["data"], unpack(TileLayout, attrs)),
    _as_it_is,
)
register(
    MAX_POOL,
    "Max pooling.",
    {"data": "images, NCHW"},
    lambda attrs, data: plain(attrs["shape"]),
    lambda attrs, data: (data[0], data[1], *unpack(PoolGeometry, attrs).out),
    lambda attrs, inputs, target: max_pool2d_compute(inputs["data"], unpack(PoolGeometry, attrs)),
    _as_it_is,
)
llvm_workaround.apply()
