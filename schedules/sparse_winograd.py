"""Sparse Winograd convolution F(m x m, r x r): transform tiles, multiply by the sparse filters, transform back.

For each of the n x n positions xi of a tile the filters are a sparse K x C matrix; the products are
``M[xi, k, t] = sum over e of values[e] * V[xi, indices[e], t]`` with tiles t as vector lanes. Input and output are in
the tile layout of tiles.py. Matrices come from winograd.py (Winograd 1980; Lavin and Gray, arXiv 1509.09308); pruning
in that domain is Liu et al., arXiv 1802.06367.

It is written in TIR, not TE: a transform has to stay in registers, which needs its sums named and shared, and the
margins of the layout have to be zeroed by whoever writes the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import tvm
from tvm import te, tir

from .blocking import WinogradBlocking
from .convolution_buffers import ConvolutionBuffers, convolution
from .epilogues import Activation
from .geometry import round_up
from .tiles import TileLayout
from .vector_code import VectorCode, even_odd
from .winograd import Matrix, transform
from .winograd_plan import WinogradPlan

_VALUES_AHEAD = 256
"""Non-zeros from the one that is used to the one that is fetched: in a network weights come from beyond L2."""

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
        data: (N, C, planes, size) in the plan's source layout, float32.
        values, indices, indptr, filters: BundledRows of formats.pack_winograd.
        bias: (K,). residual: (N, K, planes, size) in the result's layout, or None.
        prefetch: whether code for the target can fetch ahead.

    Returns:
        (N, K, planes, size) in the plan's result layout, zero around the image.
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
        self.matrices = transform(plan.result.m, plan.geometry.kernel[0])
        self.ib = tvm.tir.ir_builder.create()
        self.code = VectorCode(self.ib, plan.result.lanes, prefetch=prefetch)

    @property
    def lanes(self) -> int:
        return self.result.lanes

    @property
    def positions(self) -> int:
        return self.matrices.n**2

    @property
    def reach(self) -> int:
        """Pixels that a filter reads above, and left of, its output."""
        return (self.geometry.kernel[0] - 1) // 2

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
        geometry, float32 = self.geometry, "float32"
        inputs = self.ib.allocate(float32, self.positions * self.plan.input_stride, name="V", scope="global")
        products = self.ib.allocate(float32, self.positions * self.plan.product_stride, name="M", scope="global")
        with self.code.loop(geometry.in_channels, "c", kind) as c:
            self._transform_input(block, c, inputs._buffer)
        with self.code.loop(self.positions, "xi", kind) as xi:
            self._multiply(block, xi, inputs._buffer, products._buffer)
        rows, cols = self._pixels_of_places(block)
        with self.code.loop(geometry.out_channels, "k", kind) as k:
            self._clear_margins(block, k)
            self._transform_output(block, k, products._buffer, rows, cols)

    def _transform_input(self, block: _Block, c: tir.PrimExpr, inputs: tir.Buffer) -> None:
        """``V = BT d B`` for one channel."""
        code, n = self.code, self.matrices.n
        stride = self.plan.input_stride
        with self._vectors(block) as vector:
            place = code.let(self._place(self.source, block) + vector)
            target = code.let(c * self.plan.tiles + vector)

            def pixel(col: int, row: int) -> tir.PrimExpr:
                plane, shift = self.source.locate(row - self.reach, col - self.reach)
                return code.load(self.buffers.data, block.image, c, plane, place + shift)

            # A few rows at a time: all of them would not fit into the registers.
            for rows in row_groups(self.matrices.BT):
                columns = [code.product(self.matrices.BT, partial(pixel, j), rows) for j in range(n)]
                for u in rows:
                    row = code.product(self.matrices.BT, partial(_entry, columns, u))
                    for v in range(n):
                        code.store(inputs, row[v], (u * n + v) * stride + target)

    def _multiply(self, block: _Block, xi: tir.PrimExpr, inputs: tir.Buffer, products: tir.Buffer) -> None:
        """``M = U V`` at one position: sums in registers, non-zeros outside, vectors inside."""
        code, plan, buffers, together = self.code, self.plan, self.buffers, self.blocking.together
        assert buffers.filters is not None
        base, target = code.let(xi * plan.input_stride), code.let(xi * plan.product_stride)
        for t in range(block.length):
            code.store(inputs, code.splat(0.0), base + plan.geometry.in_channels * plan.tiles + t * self.lanes)
        with code.loop(plan.bundles, "bundle") as i:
            bundle = code.let(xi * plan.bundles + i)
            first = code.let(buffers.indptr[bundle])
            count = code.let(buffers.indptr[bundle + 1] - first)
            sums = [code.array(block.length, "sums") for _ in range(together)]
            for one in chain(*sums):
                code.set(one, code.splat(0.0))
            with code.loop(count, "e") as e:
                entry = code.let((first + e) * together)
                code.fetch(buffers.values, entry + _VALUES_AHEAD)
                for r in range(together):
                    operand = code.let(base + tir.Cast("int32", buffers.indices[entry + r]) * plan.index_unit)
                    weight = code.keep(code.splat(buffers.values[entry + r]))
                    for t, one in enumerate(sums[r]):
                        code.set(one, one + weight * code.load(inputs, operand + t * self.lanes))
            for r in range(together):
                row = code.let(target + buffers.filters[bundle * together + r] * plan.tiles)
                for t, one in enumerate(sums[r]):
                    code.store(products, one, row + t * self.lanes)

    def _transform_output(
        self, block: _Block, k: tir.PrimExpr, products: tir.Buffer, rows: tir.Buffer, cols: tir.Buffer
    ) -> None:
        """``Y = AT M A`` for one filter, and the epilogue."""
        code, n = self.code, self.matrices.n
        stride = self.plan.product_stride
        bias = code.keep(code.splat(self.buffers.bias[k]))
        with self._vectors(block) as vector:
            source = code.let(k * self.plan.tiles + vector)

            def at_position(v: int, u: int) -> tir.PrimExpr:
                return code.load(products, (u * n + v) * stride + source)

            columns = [code.product(self.matrices.AT, partial(at_position, v)) for v in range(n)]
            for i in range(self.result.m):
                row = code.product(self.matrices.AT, partial(_entry, columns, i))
                for j in range(self.result.m):
                    self._store_pixel(block, k, vector, (i, j), row[j] + bias, (rows, cols))

    def _store_pixel(
        self,
        block: _Block,
        k: tir.PrimExpr,
        vector: tir.PrimExpr,
        pixel: tuple[int, int],
        value: tir.PrimExpr,
        pixels_of_places: tuple[tir.Buffer, tir.Buffer],
    ) -> None:
        """Finish pixel (i, j) of a vector of tiles; in a spread layout it may be beside the neighbouring tiles too."""
        code, result, m = self.code, self.result, self.result.m
        (i, j), (rows, cols) = pixel, pixels_of_places
        place = self._place(result, block) + vector
        if self.buffers.residual is not None:
            value = value + code.load(self.buffers.residual, block.image, k, result.plane(i, j), place)
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
            code.store(self.buffers.result, kept, block.image, k, result.plane(i, col), place + to)

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

        def clear(start: int, stop: int) -> None:
            with self.code.loop(result.planes, "plane") as plane:
                for place in range(start, stop, self.lanes):
                    self.code.store(self.buffers.result, self.code.splat(0.0), block.image, k, plane, place)

        with self.ib.if_scope(block.number == 0):
            clear(0, result.margin)
            self._clear_edge(block, k, result.margin, [col for col in result.columns if col < 0])
        with self.ib.if_scope(block.number == self.blocking.blocks - 1):
            clear(result.end, result.size)
            self._clear_edge(block, k, result.end - 1, [col for col in result.columns if col >= result.m])

    def _clear_edge(self, block: _Block, k: tir.PrimExpr, place: int, columns: Sequence[int]) -> None:
        """What no neighbour writes: the first tile has none to its left, the last place none to its right."""
        for col in columns:
            for row in range(self.result.m):
                at = [block.image, k, self.result.plane(row, col), place]
                self.ib.emit(tir.BufferStore(self.buffers.result, tir.const(0, "float32"), at))

    def _place(self, layout: TileLayout, block: _Block) -> tir.PrimExpr:
        """Of the block's first tile."""
        return layout.margin + block.number * (self.blocking.vectors * self.lanes)

    @contextmanager
    def _vectors(self, block: _Block) -> Iterator[tir.PrimExpr]:
        """A loop over the vectors of a block; gives the first lane's number in the block."""
        with self.code.loop(block.length, "t") as t:
            yield t * self.lanes


def blocks_in_parallel(batch: int, blocking: WinogradBlocking) -> bool:
    """Whether each block is computed from beginning to end by one thread; otherwise the steps of a block are parallel,
    over channels, positions and filters."""
    return batch * blocking.blocks >= _PARALLEL_BLOCKS


_PARALLEL_BLOCKS = 4


def _entry(columns: Sequence[Mapping[int, tir.PrimExpr]], row: int, column: int) -> tir.PrimExpr:
    return columns[column][row]


def row_groups(matrix: Matrix) -> list[tuple[int, ...]]:
    """Rows that share sums together, the others alone."""
    groups: list[tuple[int, ...]] = []
    row = 0
    while row < len(matrix):
        paired = row + 1 < len(matrix) and even_odd(matrix[row], matrix[row + 1]) is not None
        groups.append((row, row + 1) if paired else (row,))
        row += len(groups[-1])
    return groups
