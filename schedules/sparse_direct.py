"""Sparse direct convolution: for every non-zero, its value times the shifted input planes.

``out[n, k, p] = sum over e of values[e] * planes[n, indices[e] + p]``, e over the non-zeros of filter k, p over the
output pixels of a block numbered along the rows of a plane. Every load is contiguous and every lane does useful work
but for the halo columns (Park et al., ICLR 2017, for the offset form; Elsen et al., arXiv 1911.09723, for vectors over
pixels with the weight broadcast).
"""

from __future__ import annotations

from tvm import te, tir

from . import phases
from .blocking import extra_channels
from .geometry import ConvGeometry
from .layouts import PhaseLayout

PRODUCTS = "jointsparse.direct.products"
OUTPUT = "jointsparse.direct.output"


def sparse_direct(
    data: te.Tensor,
    values: te.Tensor,
    indices: te.Tensor,
    indptr: te.Tensor,
    geometry: ConvGeometry,
    layout: PhaseLayout,
    panel: int,
) -> te.Tensor:
    """Convolve.

    Args:
        data: (N, C, H, W) float32. values, indices, indptr: SparseRows of formats.pack_direct for `layout`.
        panel: output pixels computed at a time, a multiple of the vector length.

    Returns:
        (N, K, output height, output width).
    """
    panels = -(-layout.flat_positions // panel)
    planes = phases.pack(data, geometry, layout, extra_channels=extra_channels(layout, panel))
    (down, across), (plane_rows, plane_cols) = layout.blocks, layout.plane

    def at(n: tir.Var, by: tir.Var, bx: tir.Var, offset: tir.PrimExpr) -> tir.PrimExpr:
        # TVM folds these divisions back into the flat offset.
        channel, within = offset // layout.channel_size, tir.floormod(offset, layout.channel_size)
        plane, place = within // (plane_rows * plane_cols), tir.floormod(within, plane_rows * plane_cols)
        return planes[n, by, bx, channel, plane, place // plane_cols, tir.floormod(place, plane_cols)]

    def product(n: tir.Var, by: tir.Var, bx: tir.Var, k: tir.Var, po: tir.Var, pi: tir.Var) -> tir.PrimExpr:
        # LLVM code generation wants loops that start at 0.
        e = te.reduce_axis((0, indptr[k + 1] - indptr[k]), name="e")
        entry = indptr[k] + e
        return te.sum(values[entry] * at(n, by, bx, indices[entry] + (po * panel + pi)), axis=e)

    products = te.compute(
        (geometry.batch, down, across, geometry.out_channels, panels, panel), product, name="products", tag=PRODUCTS
    )

    def pixel(n: tir.Var, k: tir.Var, h: tir.Var, w: tir.Var) -> tir.PrimExpr:
        place = phases.unbounded(tir.floormod(h, layout.rows) * plane_cols + tir.floormod(w, layout.cols))
        return products[n, h // layout.rows, w // layout.cols, k, place // panel, tir.floormod(place, panel)]

    return te.compute(geometry.out_shape, pixel, name="output", tag=OUTPUT)
