"""Sparse Winograd convolution F(m x m, r x r) of images in the tile layout of tiles.py, block by block; what is done
with a block is in winograd_steps.py.

It is written in TIR, not TE: a transform has to stay in registers, which needs its sums named and shared, and the
margins of the layout have to be zeroed by whoever writes the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import tvm
from tvm import te, tir

from .blocking import WinogradBlocking
from .convolution_buffers import ConvolutionBuffers, convolution
from .epilogues import Activation
from .geometry import round_up
from .tiles import TileLayout
from .vector_code import VectorCode
from .winograd_plan import WinogradPlan
from .winograd_steps import Weights, WinogradSteps

_NOWHERE = 2**30
"""Row or column of a place that is no tile's."""


def sparse_winograd(
    data: te.Tensor,
    values: te.Tensor,
    indices: te.Tensor,
    indptr: te.Tensor,
    filters: te.Tensor,
    bias: te.Tensor,
    residual: te.Tensor | None,
    *,
    plan: WinogradPlan,
    activation: Activation,
    prefetch: bool,
) -> te.Tensor:
    """Convolve, add, activate.

    Args:
        data: (N, C, length) in the plan's source layout, float32.
        values, indices, indptr, filters: BundledRows of formats.pack_winograd.
        bias: (K,). residual: (N, K, length) in the result's layout, or None.
        prefetch: whether code for the target can fetch ahead.

    Returns:
        (N, K, length) in the plan's result layout, zero around the image.
    """
    shape = plan.result.shape(plan.geometry.batch, plan.geometry.out_channels)
    return convolution(
        "winograd",
        shape,
        {
            "data": data,
            "values": values,
            "indices": indices,
            "indptr": indptr,
            "filters": filters,
            "bias": bias,
            "residual": residual,
        },
        lambda buffers: _Kernel(buffers, plan, activation, prefetch).emit(),
    )


@dataclass(frozen=True)
class _Block:
    """Some vectors of tiles of one image. number: of the block, within the image. length: its vectors."""

    image: tir.PrimExpr
    number: tir.PrimExpr
    length: int


class _Kernel:
    """Emits one convolution."""

    def __init__(self, buffers: ConvolutionBuffers, plan: WinogradPlan, activation: Activation, prefetch: bool) -> None:
        self.buffers = buffers
        self.plan, self.geometry, self.blocking = plan, plan.geometry, plan.blocking
        self.source, self.result = plan.source, plan.result
        self.activation = activation
        self.ib = tvm.tir.ir_builder.create()
        self.code = VectorCode(self.ib, plan.result.lanes, prefetch=prefetch)
        self.steps = WinogradSteps(
            self.code, plan, Weights(buffers.values, buffers.indices, buffers.indptr, _filters(buffers), buffers.bias)
        )

    @property
    def lanes(self) -> int:
        return self.result.lanes

    def emit(self) -> tir.Stmt:
        parallel_blocks = blocks_in_parallel(self.geometry.batch, self.blocking)
        images, blocks = self.geometry.batch, self.blocking.blocks
        if parallel_blocks:
            with self.code.loop(images * blocks, "block", "parallel") as i:
                self._block_of_any_length(i // blocks, tir.floormod(i, blocks), "serial")
        else:
            with self.code.loop(images * blocks, "block") as i:
                self._block_of_any_length(i // blocks, tir.floormod(i, blocks), "parallel")
        return self.ib.get()

    def _block_of_any_length(self, image: tir.PrimExpr, number: tir.PrimExpr, kind: str) -> None:
        whole, last = self.blocking.vectors, self.blocking.last
        if whole == last:
            self._block(_Block(image, number, whole), kind)
            return
        with self.ib.if_scope(number < self.blocking.blocks - 1):
            self._block(_Block(image, number, whole), kind)
        with self.ib.else_scope():
            self._block(_Block(image, number, last), kind)

    def _block(self, block: _Block, kind: str) -> None:
        """All three steps; each goes over what can be done in parallel, `kind` says whether it is."""
        code, plan, steps = self.code, self.plan, self.steps
        inputs = self.ib.allocate("float32", plan.positions * plan.input_stride, name="V", scope="global")._buffer
        products = self.ib.allocate("float32", plan.positions * plan.product_stride, name="M", scope="global")._buffer
        with code.loop(self.geometry.in_channels, "c", kind) as c:
            steps.transform_input(c, block.length, partial(self._load_pixel, block, c), inputs)
        with code.loop(plan.positions, "xi", kind) as xi:
            steps.multiply(xi, block.length, inputs, products)
        pixels = self._pixels_of_places(block)
        with code.loop(self.geometry.out_channels, "k", kind) as k:
            self._clear_margins(block, k)
            steps.transform_output(k, block.length, products, partial(self._store_pixel, block, k, pixels))

    def _load_pixel(self, block: _Block, c: tir.PrimExpr, vector: tir.PrimExpr, row: int, col: int) -> tir.PrimExpr:
        place = self._place(self.source, block) + vector
        return self.code.load(self.buffers.data, block.image, c, place + self.source.locate(row, col))

    def _store_pixel(
        self,
        block: _Block,
        k: tir.PrimExpr,
        pixels_of_places: tuple[tir.Buffer, tir.Buffer],
        vector: tir.PrimExpr,
        i: int,
        j: int,
        value: tir.PrimExpr,
    ) -> None:
        """Finish pixel (i, j) of a vector of tiles; in a spread layout it may be beside the neighbouring tiles too."""
        code, result, m = self.code, self.result, self.result.m
        rows, cols = pixels_of_places
        place = self._place(result, block) + vector
        if self.buffers.residual is not None:
            value = value + code.load(self.buffers.residual, block.image, k, result.plane(i, j) + place)
        value = code.keep(self.activation.emit(code, value))
        for col in result.columns:
            if col % m != j:
                continue
            to = -(col // m)  # the tile whose column `col` this is, counted from the pixel's own
            row_at = code.load(rows, self.lanes + vector + to)
            col_at = code.load(cols, self.lanes + vector + to)
            inside = tir.And(
                row_at < code.splat(result.height - i, "int32"), col_at < code.splat(result.width - col, "int32")
            )
            if col < 0:
                inside = tir.And(inside, col_at >= code.splat(-col, "int32"))
            kept = tir.Select(inside, value, code.splat(0.0))
            code.store(self.buffers.result, kept, block.image, k, result.plane(i, col) + place + to)

    def _pixels_of_places(self, block: _Block) -> tuple[tir.Buffer, tir.Buffer]:
        """First row and column of the tile at each place of a block, and of the vectors before and behind it."""
        places, result = (block.length + 2) * self.lanes, self.result
        rows = self.ib.allocate("int32", places, name="rows", scope="global")
        cols = self.ib.allocate("int32", places, name="cols", scope="global")
        with self.code.loop(places, "place") as i:
            # Counted from a row of tiles further up, for the division to be one of positive numbers.
            place = block.number * (self.blocking.vectors * self.lanes) + i - self.lanes + result.margin
            above = round_up(result.margin, result.cols) - result.margin
            row, col = (place + above) // result.cols, tir.floormod(place + above, result.cols)
            first = (result.margin + above) // result.cols
            is_tile = tir.all(row >= first, row < first + result.grid[0], col < result.grid[1])
            rows[i] = tir.Select(is_tile, (row - first) * result.m, _NOWHERE)
            cols[i] = tir.Select(is_tile, col * result.m, _NOWHERE)
        return rows._buffer, cols._buffer

    def _clear_margins(self, block: _Block, k: tir.PrimExpr) -> None:
        result = self.result

        def clear(start: int, stop: int, planes: int = result.planes) -> None:
            with self.code.loop(planes, "plane") as plane:
                for place in range(start, stop, self.lanes):
                    at = plane * result.stride + place
                    self.code.store(self.buffers.result, self.code.splat(0.0), block.image, k, at)

        with self.ib.if_scope(block.number == 0):
            clear(0, result.margin)
            self._clear_edge(block, k, result.margin, [col for col in result.columns if col < 0])
        with self.ib.if_scope(block.number == self.blocking.blocks - 1):
            clear(result.end, result.stride)
            clear(result.length - result.margin, result.length, planes=1)
            self._clear_edge(block, k, result.end - 1, [col for col in result.columns if col >= result.m])

    def _clear_edge(self, block: _Block, k: tir.PrimExpr, place: int, columns: Sequence[int]) -> None:
        """What no neighbour writes: the first tile has none to its left, the last place none to its right."""
        for col in columns:
            for row in range(self.result.m):
                at = [block.image, k, self.result.plane(row, col) + place]
                self.ib.emit(tir.BufferStore(self.buffers.result, tir.const(0, "float32"), at))

    def _place(self, layout: TileLayout, block: _Block) -> tir.PrimExpr:
        """Of the block's first tile."""
        return layout.margin + block.number * (self.blocking.vectors * self.lanes)


def blocks_in_parallel(batch: int, blocking: WinogradBlocking) -> bool:
    """Whether each block is computed from beginning to end by one thread; otherwise the steps of a block are parallel,
    over channels, positions and filters."""
    return batch * blocking.blocks >= _PARALLEL_BLOCKS


_PARALLEL_BLOCKS = 4


def _filters(buffers: ConvolutionBuffers) -> tir.Buffer:
    assert buffers.filters is not None
    return buffers.filters
