"""Sparse direct convolution: for every non-zero, its value times the shifted input.

``out[k, p] = sum over e of values[e] * planes[indices[e] + p]``, e over the non-zeros of filter k, p over the outputs
of a block, which are vector lanes: weights are broadcast, every load is contiguous (Park et al., ICLR 2017, for the
offset form; Elsen et al., arXiv 1911.09723, for vectors over pixels). Input channels are blocked, so that what all
filters read of a few channels stays in L1; in between the sums of a block lie in L2.

It is written in TIR, not TE, which cannot go on with a data-dependent sum where it was left.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import te, tir

from .convolution_buffers import ConvolutionBuffers, convolution
from .direct_plan import DirectPlan
from .epilogues import Activation
from .vector_code import VectorCode

_PARALLEL_BLOCKS = 4
"""With this many blocks or more, blocks run in parallel; with fewer, the channels and filters of a block."""

_FILTER_CHUNKS = 8
"""Into how many parts filters are split to run in parallel."""


def sparse_direct(
    data: te.Tensor,
    values: te.Tensor,
    indices: te.Tensor,
    indptr: te.Tensor,
    bias: te.Tensor,
    residual: te.Tensor | None,
    *,
    plan: DirectPlan,
    shape: tuple[int, int, int, int],
    activation: Activation,
) -> te.Tensor:
    """Convolve, add, activate.

    Args:
        data: (N, C, H, W) float32, of the plan's geometry.
        values, indices, indptr: SparseRows of formats.pack_direct for the plan.
        bias: (K,). residual: of the shape of the result, or None.
        shape: of the result; not the plan's, if that has the image in one row.

    Returns:
        (N, K, output height, output width).
    """
    return convolution(
        "direct",
        shape,
        {
            "data": data,
            "values": values,
            "indices": indices,
            "indptr": indptr,
            "bias": bias,
            "residual": residual,
        },
        lambda buffers: _Kernel(buffers, plan, activation).emit(),
    )


@dataclass(frozen=True)
class _Block:
    """Outputs of an image. down, across: of the block, in blocks."""

    image: tir.PrimExpr
    down: tir.PrimExpr
    across: tir.PrimExpr


def blocks_in_parallel(plan: DirectPlan) -> bool:
    """Whether each block is computed from beginning to end by one thread."""
    down, across = plan.blocks
    return plan.geometry.batch * down * across >= _PARALLEL_BLOCKS


class _Kernel:
    """Emits one convolution."""

    def __init__(self, buffers: ConvolutionBuffers, plan: DirectPlan, activation: Activation) -> None:
        self.buffers = buffers
        self.plan = plan
        self.geometry = plan.geometry
        self.activation = activation
        self.ib = tvm.tir.ir_builder.create()
        self.code = VectorCode(self.ib, plan.lanes)

    def emit(self) -> tir.Stmt:
        down, across = self.plan.blocks
        outer, inner = ("parallel", "serial") if blocks_in_parallel(self.plan) else ("serial", "parallel")
        with self.code.loop(self.geometry.batch * down * across, "block", outer) as i:
            image, within = i // (down * across), tir.floormod(i, down * across)
            self._block(_Block(image, within // across, tir.floormod(within, across)), inner)
        return self.ib.get()

    def _block(self, block: _Block, kind: str) -> None:
        plan, geometry = self.plan, self.geometry
        planes = self.ib.allocate("float32", plan.planes_size, name="planes", scope="global")._buffer
        outputs = plan.vectors * plan.lanes
        sums = self.ib.allocate("float32", geometry.out_channels * outputs, name="sums", scope="global")._buffer
        with self.code.loop(geometry.in_channels, "c", kind) as c:
            self._fill_planes(block, c, planes)
        if geometry.groups == 1:
            self._all_filters(block, planes, sums, kind)
        else:
            self._grouped_filters(block, planes, sums, kind)

    def _all_filters(self, block: _Block, planes: tir.Buffer, sums: tir.Buffer, kind: str) -> None:
        filters = self.geometry.out_channels
        chunk = -(-filters // _FILTER_CHUNKS) if kind == "parallel" else filters
        with self.code.loop(-(-filters // chunk), "chunk", kind) as part:
            first = part * chunk
            count = chunk if filters % chunk == 0 else tir.min(chunk, filters - first)
            with self.code.loop(count, "k") as k:
                self._begin(first + k, sums)
            with self.code.loop(self.plan.channel_blocks, "c") as channels, self.code.loop(count, "k") as k:
                self._add_products(channels, first + k, planes, sums)
            with self.code.loop(count, "k") as k:
                self._finish(block, first + k, sums)

    def _grouped_filters(self, block: _Block, planes: tir.Buffer, sums: tir.Buffer, kind: str) -> None:
        """A filter reads the channels of its group only, and a block of channels is of whole groups."""
        blocks = self.plan.channel_blocks
        count = self.geometry.out_channels // blocks
        with self.code.loop(blocks, "c", kind) as channels, self.code.loop(count, "k") as k:
            self._begin(channels * count + k, sums)
            self._add_products(channels, channels * count + k, planes, sums)
            self._finish(block, channels * count + k, sums)

    def _fill_planes(self, block: _Block, c: tir.PrimExpr, planes: tir.Buffer) -> None:
        """Of one channel, zero padding included."""
        plan, geometry = self.plan, self.geometry
        for number, phase in enumerate(plan.phases):
            with self.code.loop(plan.plane_rows, "row") as row:
                pixel_row = (block.down * plan.rows + row) * geometry.strides[0] + (phase - geometry.padding[0])
                starts = [
                    (c * plan.channel_rows + plan.plane_row(col, number) + row) * plan.cols
                    for col in range(geometry.kernel[1])
                ]
                with self.ib.if_scope(tir.all(pixel_row >= 0, pixel_row < geometry.in_height)):
                    for col, start in enumerate(starts):
                        self._fill_row(block, c, pixel_row, col, planes, start)
                with self.ib.else_scope():
                    for start in starts:
                        self._zero(planes, start, 0, plan.cols)

    def _fill_row(
        self,
        block: _Block,
        c: tir.PrimExpr,
        pixel_row: tir.PrimExpr,
        col: int,
        planes: tir.Buffer,
        start: tir.PrimExpr,
    ) -> None:
        """What a column of the filter reads of a row of pixels."""
        plan, geometry = self.plan, self.geometry
        stride = geometry.strides[1]
        # Pixel under the first output: left of the image by as much as `first` is below 0.
        first = block.across * (plan.cols * stride) + (col * geometry.dilation[1] - geometry.padding[1])
        begin = tir.max(0, tir.min(plan.cols, tir.floordiv(stride - 1 - first, stride)))
        end = tir.max(begin, tir.min(plan.cols, tir.floordiv(geometry.in_width - 1 - first, stride) + 1))
        begin, end = self.code.let(begin), self.code.let(end)
        self._zero(planes, start, 0, begin)
        with self.code.loop(end - begin, "x") as x:
            at = self._pixel(self.buffers.data, pixel_row, first + (begin + x) * stride)
            self.ib.emit(tir.BufferStore(planes, self.buffers.data[(block.image, c, *at)], [start + begin + x]))
        self._zero(planes, start, end, plan.cols)

    def _zero(self, buffer: tir.Buffer, start: tir.PrimExpr, begin: tir.PrimExpr, end: tir.PrimExpr) -> None:
        with self.code.loop(end - begin, "x") as x:
            self.ib.emit(tir.BufferStore(buffer, tir.const(0, "float32"), [start + begin + x]))

    def _begin(self, k: tir.PrimExpr, sums: tir.Buffer) -> None:
        bias = self.code.keep(self.code.splat(self.buffers.bias[k]))
        for t in range(self.plan.vectors):
            self.code.store(sums, bias, self._sum(k, t))

    def _sum(self, k: tir.PrimExpr, t: int) -> tir.PrimExpr:
        return (k * self.plan.vectors + t) * self.plan.lanes

    def _add_products(self, channels: tir.PrimExpr, k: tir.PrimExpr, planes: tir.Buffer, sums: tir.Buffer) -> None:
        """Those of a filter with a block of channels: sums in registers, non-zeros outside, vectors inside."""
        code, plan, buffers = self.code, self.plan, self.buffers
        row = code.let(channels * self.geometry.out_channels + k)
        first = code.let(buffers.indptr[row])
        count = code.let(buffers.indptr[row + 1] - first)
        base = code.let(channels * (plan.channels * plan.channel_rows * plan.cols))
        inside = code.array(plan.vectors, "inside")
        for t, one in enumerate(inside):
            code.set(one, code.load(sums, self._sum(k, t)))
        with code.loop(count, "e") as e:
            operand = code.let(base + tir.Cast("int32", buffers.indices[first + e]) * plan.cols)
            weight = code.keep(code.splat(buffers.values[first + e]))
            for t, one in enumerate(inside):
                code.set(one, one + weight * code.load(planes, operand + t * plan.lanes))
        for t, one in enumerate(inside):
            code.store(sums, one, self._sum(k, t))

    def _finish(self, block: _Block, k: tir.PrimExpr, sums: tir.Buffer) -> None:
        """Residual, activation, and the outputs of a block into their image."""
        plan, geometry = self.plan, self.geometry
        with self.code.loop(plan.rows, "row") as row:
            y = block.down * plan.rows + row
            with self.ib.if_scope(y < geometry.out_height):
                self._finish_row(block, k, y, (k * plan.rows + row) * plan.cols, sums)

    def _finish_row(
        self, block: _Block, k: tir.PrimExpr, y: tir.PrimExpr, start: tir.PrimExpr, sums: tir.Buffer
    ) -> None:
        left = block.across * self.plan.cols
        with self.code.loop(tir.min(self.plan.cols, self.geometry.out_width - left), "x") as x:
            at = (block.image, k, *self._pixel(self.buffers.result, y, left + x))
            value = sums[start + x]
            if self.buffers.residual is not None:
                value = value + self.buffers.residual[at]
            value = self.activation.emit(VectorCode(self.ib, 1), value)
            self.ib.emit(tir.BufferStore(self.buffers.result, value, at))

    def _pixel(self, image: tir.Buffer, row: tir.PrimExpr, col: tir.PrimExpr) -> tuple[tir.PrimExpr, tir.PrimExpr]:
        """Where a pixel is that the plan counts in one row. TVM folds the division back into the flat offset."""
        width = int(image.shape[3])
        is_in_one_row = int(image.shape[2]) != 1 and self.geometry.in_height == self.geometry.out_height == 1
        return (col // width, tir.floormod(col, width)) if is_in_one_row else (row, col)
