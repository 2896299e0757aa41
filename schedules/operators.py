"""The operators of the sparse layers; importing this module registers them and readies LLVM.

``jointsparse.conv2d_sparse_direct`` takes data, four constants (values, indices, indptr, filters: BundledRows of
formats.py) and a bias, in its form ``..._add`` a residual as well, which it adds before it activates; NCHW, float32.
Without a residual it may take the maximum over windows before it activates (pooled_direct.py).
``jointsparse.conv2d_sparse_winograd`` does the same with images in tile layout, into and out of which
``jointsparse.to_tiles`` and ``jointsparse.from_tiles`` bring them, or with images NCHW (see tile_images.py).
``jointsparse.dense_sparse`` is otherwise like ``nn.dense``: what may follow it is fused into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tvm
from tvm import te

from . import cpu_dense, llvm_workaround
from .attributes import direct_plan_of, direct_result, pooling_of, winograd_plan_of
from .buffers import dense_buffers, why_too_large
from .convolution_buffers import Arguments
from .epilogues import Activation
from .geometry import ConvGeometry
from .max_pool import PoolGeometry, max_pool2d
from .registration import OtherShape, plain, register, unpack
from .sparse_dense import DensePlan, sparse_dense
from .sparse_direct import sparse_direct
from .sparse_winograd import sparse_winograd
from .targets import code_features, cpu_facts
from .tile_conversions import from_tiles, to_tiles
from .tile_images import ImageEnds
from .tiles import TileLayout

DIRECT = "jointsparse.conv2d_sparse_direct"
DIRECT_ADD = "jointsparse.conv2d_sparse_direct_add"
WINOGRAD = "jointsparse.conv2d_sparse_winograd"
WINOGRAD_ADD = "jointsparse.conv2d_sparse_winograd_add"
TO_TILES = "jointsparse.to_tiles"
FROM_TILES = "jointsparse.from_tiles"
MAX_POOL = "jointsparse.max_pool2d"
DENSE_SPARSE = "jointsparse.dense_sparse"


def _compute_direct(attrs: tvm.ir.Attrs, inputs: Mapping[str, te.Tensor], target: tvm.target.Target) -> te.Tensor:
    return sparse_direct(
        Arguments(**inputs),
        plan=direct_plan_of(attrs),
        shape=direct_result(attrs),
        activation=unpack(Activation, attrs),
        features=code_features(target),
        pool=pooling_of(attrs),
    )


def _compute_winograd(attrs: tvm.ir.Attrs, inputs: Mapping[str, te.Tensor], target: tvm.target.Target) -> te.Tensor:
    return sparse_winograd(
        Arguments(**inputs),
        plan=winograd_plan_of(attrs),
        activation=unpack(Activation, attrs),
        ends=unpack(ImageEnds, attrs),
        features=code_features(target),
    )


def _compute_dense(attrs: tvm.ir.Attrs, inputs: Mapping[str, te.Tensor], target: tvm.target.Target) -> te.Tensor:
    plan, lanes = unpack(DensePlan, attrs), cpu_facts(target).lanes
    reason = why_too_large(dense_buffers(plan, lanes))
    if reason is not None:
        raise ValueError(reason)
    return sparse_dense(**inputs, plan=plan, lanes=lanes, features=code_features(target))


def _as_it_is(attrs: tvm.ir.Attrs, outs: Sequence[te.Tensor], target: tvm.target.Target) -> te.Schedule:
    """Of what is TIR already."""
    return te.create_schedule([out.op for out in outs])


def _nchw(attrs: tvm.ir.Attrs, data: Sequence[int | None]) -> Sequence[int | None]:
    geometry = unpack(ConvGeometry, attrs)
    return geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width


def _winograd_source(attrs: tvm.ir.Attrs, data: Sequence[int | None]) -> Sequence[int | None]:
    return unpack(ImageEnds, attrs).data_shape(winograd_plan_of(attrs))


def _winograd_result(attrs: tvm.ir.Attrs, data: Sequence[int]) -> Sequence[int]:
    return unpack(ImageEnds, attrs).result_shape(winograd_plan_of(attrs))


def _images_in_tiles(attrs: tvm.ir.Attrs, data: Sequence[int | None]) -> Sequence[int | None]:
    """Of any two sizes first."""
    layout = unpack(TileLayout, attrs)
    return [*[*data, None, None][:2], layout.length]


def _image_shape(attrs: tvm.ir.Attrs, data: Sequence[int]) -> Sequence[int]:
    layout = unpack(TileLayout, attrs)
    return data[0], data[1], layout.height, layout.width


_WEIGHTS = {
    "values": "non-zeros, row after row or bundle after bundle",
    "indices": "where the operand of each non-zero lies",
    "indptr": "start of each row or bundle",
}
_CONVOLUTION = {"data": "input", **_WEIGHTS, "filters": "filter of each row", "bias": "of each filter"}
_RESIDUAL = {"residual": "of the shape of the result"}
_BIAS: dict[str, OtherShape] = {"bias": lambda result: result[1:2]}
_BIAS_AND_RESIDUAL: dict[str, OtherShape] = {**_BIAS, "residual": lambda result: result}

for _name, _arguments, _others in (
    (DIRECT, _CONVOLUTION, _BIAS),
    (DIRECT_ADD, _CONVOLUTION | _RESIDUAL, _BIAS_AND_RESIDUAL),
):
    register(
        _name,
        "Sparse direct convolution of images NCHW, bias, residual, max pooling and activation.",
        _arguments,
        _nchw,
        lambda attrs, data: direct_result(attrs),
        _compute_direct,
        _as_it_is,
        other_shapes=_others,
    )
for _name, _arguments, _others in (
    (WINOGRAD, _CONVOLUTION, _BIAS),
    (WINOGRAD_ADD, _CONVOLUTION | _RESIDUAL, _BIAS_AND_RESIDUAL),
):
    register(
        _name,
        "Sparse Winograd convolution of images in tile layout or NCHW, bias, residual and activation.",
        _arguments,
        _winograd_source,
        _winograd_result,
        _compute_winograd,
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
    lambda attrs, inputs, target: max_pool2d(inputs["data"], unpack(PoolGeometry, attrs), cpu_facts(target).lanes),
    _as_it_is,
)
llvm_workaround.apply()
