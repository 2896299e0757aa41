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

from .convolution_buffers import Arguments, ConvolutionBuffers, convolution
from .epilogues import Activation
from .geometry import round_up
from .vector_code import VectorCode
from .winograd_plan import WinogradPlan
from .winograd_steps import Weights, WinogradSteps

_NOWHERE = 2**30
"""Row or column of a place that is no tile's."""


def sparse_winograd(
    arguments: Arguments[te.Tensor],
    *,
    plan: WinogradPlan,
    activation: Activation,
    prefetch: bool,
) -> te.Tensor:
    """Convolve, add, activate.

    Args:
        arguments: data (N, C, length) in the plan's layout, float32; BundledRows of formats.pack_winograd for the plan;
            bias (K,); residual (N, K, length) in the plan's layout.
        prefetch: whether code for the target can fetch ahead.

    Returns:
        (N, K, length) in the plan's layout, zero around the image.
    """
    shape = plan.layout.shape(plan.geometry.batch, plan.geometry.out_channels)
    return convolution(
        "winograd", shape, arguments, lambda buffers: _Kernel(buffers, plan, activation, prefetch).emit()
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
        self.layout = plan.layout
        self.activation = activation
        self.ib = tvm.tir.ir_builder.create()
        self.code = VectorCode(self.ib, plan.layout.lanes, prefetch=prefetch)
        self.steps = WinogradSteps(self.code, plan, Weights(buffers))

    @property
    def lanes(self) -> int:
        return self.layout.lanes

    def emit(self) -> tir.Stmt:
        images, blocks = self.geometry.batch, self.blocking.blocks
        if self.plan.blocks_in_parallel:
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
        place = self._place(block) + vector
        return self.code.load(self.buffers.data, block.image, c, place + self.layout.locate(row, col))

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
        code, layout, m = self.code, self.layout, self.layout.m
        rows, cols = pixels_of_places
        place = self._place(block) + vector
        if self.buffers.residual is not None:
            value = value + code.load(self.buffers.residual, block.image, k, layout.plane(i, j) + place)
        value = code.keep(self.activation.emit(code, value))
        for col in layout.columns:
            if col % m != j:
                continue
            to = -(col // m)  # the tile whose column `col` this is, counted from the pixel's own
            row_at = code.load(rows, self.lanes + vector + to)
            col_at = code.load(cols, self.lanes + vector + to)
            inside = tir.And(
                row_at < code.splat(layout.height - i, "int32"), col_at < code.splat(layout.width - col, "int32")
            )
            if col < 0:
                inside = tir.And(inside, col_at >= code.splat(-col, "int32"))
            kept = tir.Select(inside, value, code.splat(0.0))
            code.store(self.buffers.result, kept, block.image, k, layout.plane(i, col) + place + to)

    def _pixels_of_places(self, block: _Block) -> tuple[tir.Buffer, tir.Buffer]:
        """First row and column of the tile at each place of a block, and of the vectors before and behind it."""
        places, layout = (block.length + 2) * self.lanes, self.layout
        rows = self.ib.allocate("int32", places, name="rows", scope="global")
        cols = self.ib.allocate("int32", places, name="cols", scope="global")
        with self.code.loop(places, "place") as i:
            # Counted from a row of tiles further up, for the division to be one of positive numbers.
            place = block.number * (self.blocking.vectors * self.lanes) + i - self.lanes + layout.margin
            above = round_up(layout.margin, layout.cols) - layout.margin
            row, col = (place + above) // layout.cols, tir.floormod(place + above, layout.cols)
            first = (layout.margin + above) // layout.cols
            is_tile = tir.all(row >= first, row < first + layout.grid[0], col < layout.grid[1])
            rows[i] = tir.Select(is_tile, (row - first) * layout.m, _NOWHERE)
            cols[i] = tir.Select(is_tile, col * layout.m, _NOWHERE)
        return rows._buffer, cols._buffer

    def _clear_margins(self, block: _Block, k: tir.PrimExpr) -> None:
        layout = self.layout

        def clear(start: int, stop: int, planes: int = layout.planes) -> None:
            with self.code.loop(planes, "plane") as plane:
                for place in range(start, stop, self.lanes):
                    at = plane * layout.stride + place
                    self.code.store(self.buffers.result, self.code.splat(0.0), block.image, k, at)

        with self.ib.if_scope(block.number == 0):
            clear(0, layout.margin)
            self._clear_edge(block, k, layout.margin, [col for col in layout.columns if col < 0])
        with self.ib.if_scope(block.number == self.blocking.blocks - 1):
            clear(layout.end, layout.stride)
            clear(layout.length - layout.margin, layout.length, planes=1)
            self._clear_edge(block, k, layout.end - 1, [col for col in layout.columns if col >= layout.m])

    def _clear_edge(self, block: _Block, k: tir.PrimExpr, place: int, columns: Sequence[int]) -> None:
        """What no neighbour writes: the first tile has none to its left, the last place none to its right."""
        for col in columns:
            for row in range(self.layout.m):
                at = [block.image, k, self.layout.plane(row, col) + place]
                self.ib.emit(tir.BufferStore(self.buffers.result, tir.const(0, "float32"), at))

    def _place(self, block: _Block) -> tir.PrimExpr:
        """Of the block's first tile."""
        return self.layout.margin + block.number * (self.blocking.vectors * self.lanes)
