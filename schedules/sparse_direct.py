"""Sparse direct convolution: for every non-zero, its value times the shifted input.

``out[k, p] = sum over e of values[e] * planes[indices[e] + p]``, e over the non-zeros of filter k, p over the outputs
of a block, which are vector lanes: weights are broadcast, every load is contiguous (Park et al., ICLR 2017, for the
offset form; Elsen et al., arXiv 1911.09723, for vectors over pixels). Input channels are blocked, so that what all
filters read of a few channels stays in L1; in between the sums of a block lie in L2. A 1x1 filter may read the input
itself, where packing it would take longer than loads that are not aligned.

It is written in TIR, not TE, which cannot go on with a data-dependent sum where it was left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import tvm
from tvm import te, tir

from .convolution_buffers import Arguments, ConvolutionBuffers, convolution
from .direct_plan import DirectPlan
from .epilogues import Activation
from .max_pool import PoolGeometry
from .pooled_direct import PooledPlan, PooledResults
from .products import Operands, Products
from .row_code import copy_every, each_run, each_vector
from .targets import CodeFeatures
from .vector_code import LINE, VectorCode, is_far, part_of, share_of


def sparse_direct(
    arguments: Arguments[te.Tensor],
    *,
    plan: DirectPlan,
    shape: tuple[int, int, int, int],
    activation: Activation,
    features: CodeFeatures,
    pool: PoolGeometry | None = None,
) -> te.Tensor:
    """Convolve, add, pool, activate.

    Args:
        arguments: data (N, C, H, W), float32, of the plan's geometry; BundledRows of formats.pack_direct for the plan;
            bias (K,); residual of the shape of the result.
        shape: of the result; not the plan's, if that has the image in one row.
        features: of the target.
        pool: only where why_not_pooled has nothing against it, and without a residual.

    Returns:
        (N, K, output height, output width).

    Raises:
        ValueError: for a residual of what is pooled.
    """
    if pool is not None and arguments.residual is not None:
        raise ValueError("a convolution that pools its result cannot add a residual before")
    return convolution(
        "direct", shape, arguments, lambda buffers: _Kernel(buffers, plan, activation, features, pool).emit()
    )


_FILTERS_AHEAD = 4
"""From the one whose sums are computed to the one whose outputs are fetched."""

_ZERO = tir.const(0, "int32")


@dataclass(frozen=True)
class _Block:
    """Outputs of an image. top, left: its first. across: of the block, in blocks."""

    image: tir.PrimExpr
    top: tir.PrimExpr
    left: tir.PrimExpr
    across: tir.PrimExpr


@dataclass(frozen=True)
class _Planes:
    """Those of a block. first: where in the buffer they begin."""

    buffer: tir.Buffer
    first: tir.PrimExpr | int = 0


@dataclass(frozen=True)
class _Work:
    """What a thread computes of a block: sums of filters from `first` on. planes: None where the input is read as it
    is. number: of the block, where it is pooled."""

    block: _Block
    planes: _Planes | None
    sums: tir.Buffer
    first: tir.PrimExpr | int = 0
    number: tir.PrimExpr | None = None


@dataclass(frozen=True)
class _Bundle:
    """Rows of weights. alone: the filter, if there is one row in each."""

    number: tir.PrimExpr
    alone: tir.PrimExpr


class _Kernel:
    """Emits one convolution."""

    def __init__(
        self,
        buffers: ConvolutionBuffers,
        plan: DirectPlan,
        activation: Activation,
        features: CodeFeatures,
        pool: PoolGeometry | None,
    ) -> None:
        self.buffers = buffers
        self.plan = plan
        self.geometry = plan.geometry
        self.activation = activation
        self.ib = tvm.tir.ir_builder.create()
        self.code = VectorCode(self.ib, plan.lanes, features=features)
        self.products = Products(self.code, buffers, plan.together)
        self.pooled = None if pool is None else PooledPlan(plan, pool)

    def emit(self) -> tir.Stmt:
        if self.pooled is not None:
            self._chunks_in_parallel(self.pooled)
        elif self.plan.in_parts:
            self._parts_in_parallel()
        elif self.plan.blocks_in_parallel:
            self._blocks_in_parallel()
        else:
            self._groups_in_parallel()
        return self.ib.get()

    def _blocks_in_parallel(self) -> None:
        """What is packed at a time is in L1 while all filters go over it."""
        plan = self.plan
        with self.code.loop(plan.all_blocks, "block", "parallel") as number:
            work = _Work(self._at(number), self._planes(plan.planes_size), self._sums())
            with self.code.loop(plan.channel_blocks, "c") as channels:
                self._channel_block(work, channels)

    def _chunks_in_parallel(self, pooled: PooledPlan) -> None:
        """Blocks of a chunk one after the other, from that before its first on, if its windows reach there."""
        code, plan = self.code, self.plan
        with code.loop(plan.geometry.batch * pooled.chunks, "chunk", "parallel") as i:
            image, chunk = self._split(i, pooled.chunks)
            first, end = (code.let(share_of(chunk + n, pooled.blocks, pooled.chunks)) for n in (0, 1))
            planes, sums = self._planes(plan.planes_size), self._sums()
            with code.loop(end - first + pooled.ahead, "block") as within:
                number = code.let(first - pooled.ahead + within)
                block = _Block(image, code.let(number * plan.rows + pooled.top), _ZERO, _ZERO)
                # The chunk above has pooled what is computed ahead.
                work = _Work(block, planes, sums, number=tir.Select(within < pooled.ahead, -1, number))
                with code.loop(plan.channel_blocks, "c") as channels:
                    self._channel_block(work, channels)

    def _groups_in_parallel(self) -> None:
        """A block of channels is of whole groups, which no other filters read."""
        plan = self.plan
        with self.code.loop(plan.all_blocks * plan.channel_blocks, "part", "parallel") as i:
            number, channels = self._split(i, plan.channel_blocks)
            self._channel_block(_Work(self._at(number), self._planes(plan.planes_size), self._sums()), channels)

    def _parts_in_parallel(self) -> None:
        """Of channels, then of filters; by blocks, so that threads mostly read what they have packed."""
        code, plan, geometry = self.code, self.plan, self.geometry
        planes = self._planes(plan.all_blocks * plan.planes_size)
        if planes is not None:
            with code.loop(plan.all_blocks * plan.channel_parts, "part", "parallel") as i:
                number, part = self._split(i, plan.channel_parts)
                first = code.let(part * plan.part_channels)
                place = _Planes(planes.buffer, code.let(number * plan.planes_size + first * plan.channel_size))
                self._pack(self._at(number), first, part_of(plan.part_channels, geometry.in_channels, first), place)
        with code.loop(plan.all_blocks * plan.filter_parts, "part", "parallel") as i:
            number, part = self._split(i, plan.filter_parts)
            own = planes and _Planes(planes.buffer, code.let(number * plan.planes_size))
            work = _Work(self._at(number), own, self._sums(), code.let(part * plan.part_filters))
            with code.loop(plan.channel_blocks, "c") as channels:
                self._add_products(work, channels, part)

    def _split(self, i: tir.PrimExpr, parts: int) -> tuple[tir.PrimExpr, tir.PrimExpr]:
        """Number of a whole, and of its part within."""
        return self.code.let(i // parts), self.code.let(tir.floormod(i, parts))

    def _at(self, number: tir.PrimExpr) -> _Block:
        """The block of a number, of those of all images."""
        code, plan = self.code, self.plan
        down, across = plan.blocks
        image, within = self._split(number, down * across)
        row, column = self._split(within, across)
        left = column * plan.cols
        if not plan.packed:
            # The last block ends with the image, some of its outputs computed twice: nothing is read beyond.
            left = tir.min(left, self.geometry.out_width - plan.cols)
        return _Block(image, code.let(row * plan.rows), code.let(left), column)

    def _planes(self, elements: int) -> _Planes | None:
        return _Planes(self._allocate("planes", elements)) if self.plan.packed else None

    def _sums(self) -> tir.Buffer:
        filters = self.plan.sums_filters if self.pooled is None else self.geometry.out_channels
        return self._allocate("sums", filters * self._sums_rows * self.plan.cols)

    @property
    def _sums_rows(self) -> int:
        """Of a filter: those of a block, behind those kept of the block above."""
        return self.plan.rows + (self.pooled.kept if self.pooled is not None else 0)

    def _allocate(self, name: str, elements: int) -> tir.Buffer:
        return self.ib.allocate("float32", elements, name=name, scope="global")._buffer

    def _channel_block(self, work: _Work, channels: tir.PrimExpr) -> None:
        """Pack a block of channels, and add its products."""
        plan, geometry = self.plan, self.geometry
        if work.planes is not None:
            first = channels * plan.channels
            self._pack(work.block, first, part_of(plan.channels, geometry.in_channels, first), work.planes)
        self._add_products(work, channels, _ZERO)

    def _pack(self, block: _Block, first: tir.PrimExpr, count: tir.PrimExpr, planes: _Planes) -> None:
        """Fill planes with channels."""
        with self.code.loop(count, "c") as c:
            self._fill_planes(block, first + c, planes.first + c * self.plan.channel_size, planes.buffer)

    def _fill_planes(self, block: _Block, c: tir.PrimExpr, base: tir.PrimExpr, planes: tir.Buffer) -> None:
        """Of one channel, zero padding included."""
        plan, geometry = self.plan, self.geometry
        for number, phase in enumerate(plan.phases):
            with self.code.loop(plan.plane_rows, "row") as row:
                pixel_row = (block.top + row) * geometry.strides[0] + (phase - geometry.padding[0])
                rows = [
                    (column, base + plan.plane(i, number) + row * plan.plane_cols)
                    for i, column in enumerate(plan.starts)
                ]
                with self.ib.if_scope(tir.all(pixel_row >= 0, pixel_row < geometry.in_height)):
                    spans = [_spans(plan, across) for across in range(plan.blocks[1])]
                    each_run(self.ib, block.across, spans, partial(self._fill_rows, block, c, pixel_row, planes, rows))
                with self.ib.else_scope():
                    for _, start in rows:
                        self._zero(planes, start, plan.plane_cols)

    def _fill_rows(
        self,
        block: _Block,
        c: tir.PrimExpr,
        pixel_row: tir.PrimExpr,
        planes: tir.Buffer,
        rows: Sequence[tuple[int, tir.PrimExpr]],
        spans: Sequence[_Span],
    ) -> None:
        """One of each plane, from the same row of pixels; (column of the filter, where the row begins)."""
        stride = self.geometry.strides[1]
        for (column, start), span in zip(rows, spans, strict=True):
            first = block.left * stride + (column - self.geometry.padding[1] + span.begin * stride)
            self._zero(planes, start, span.begin)
            copy_every(
                self.code,
                (self.buffers.data, (block.image, c, pixel_row), first),
                (planes, (), start + span.begin),
                stride,
                span.count,
                span.safe,
            )
            end = span.begin + span.count
            self._zero(planes, start + end, self.plan.plane_cols - end)

    def _zero(self, buffer: tir.Buffer, start: tir.PrimExpr, count: int) -> None:
        each_vector(self.code, count, lambda code, x: code.store(buffer, code.splat(0.0), start + x))

    def _add_products(self, work: _Work, channels: tir.PrimExpr, segment: tir.PrimExpr) -> None:
        """Those of a segment of the filters with a block of channels; after the last block a filter is done."""
        code, plan = self.code, self.plan
        of_block = channels if self.geometry.groups > 1 else segment
        first = code.let((channels * plan.segments + segment) * plan.bundles)
        first_filter = code.let(of_block * plan.segment_filters)
        with code.loop(plan.bundles, "i") as i:
            bundle = _Bundle(code.let(first + i), first_filter + i)
            with self.ib.if_scope(self._filter(bundle, 0) < self.geometry.out_channels):
                self._fetch_results(work, channels, bundle)
                with code.loop(plan.panels, "panel") as panel:
                    self._add_to_panel(work, channels, bundle, panel)
                if plan.visits == 1:
                    self._finish_bundle(work, bundle)
                else:
                    with self.ib.if_scope(channels == plan.visits - 1):
                        self._finish_bundle(work, bundle)

    def _filter(self, bundle: _Bundle, row: tir.PrimExpr | int) -> tir.PrimExpr:
        """Its number; as many as there are, or more, where there is none."""
        if self.plan.together == 1:
            return bundle.alone
        assert self.buffers.filters is not None
        return self.buffers.filters[bundle.number * self.plan.together + row]

    def _sum(self, work: _Work, bundle: _Bundle, row: tir.PrimExpr | int) -> tir.PrimExpr:
        """Where those of a row begin."""
        plan = self.plan
        remains = plan.visits > 1 or self.pooled is not None
        number = self._filter(bundle, row) - work.first if remains else row
        return number * (self._sums_rows * plan.cols) + (self._sums_rows - plan.rows) * plan.cols

    def _fetch_results(self, work: _Work, channels: tir.PrimExpr, bundle: _Bundle) -> None:
        """The outputs of filters in a block, where they are about to be written."""
        plan, geometry = self.plan, self.geometry
        far = is_far(geometry.out_channels * geometry.out_height * geometry.out_width)
        if not (self.code.features.fetch and far) or self.pooled is not None:
            return
        bundles = max(1, _FILTERS_AHEAD // plan.together)
        ahead = _Bundle(self.code.let(bundle.number + bundles), bundle.alone + bundles)
        is_there = ahead.number < plan.channel_blocks * plan.segments * plan.bundles
        if plan.visits > 1:
            is_there = tir.And(channels == plan.visits - 1, is_there)
        with self.ib.if_scope(is_there), self.code.loop(plan.together, "r") as r:
            self._fetch_result(work, self.code.let(self._filter(ahead, r)))

    def _fetch_result(self, work: _Work, k: tir.PrimExpr) -> None:
        with self.ib.if_scope(k < self.geometry.out_channels), self.code.loop(self.plan.rows, "row") as row:
            for x in range(0, self.plan.cols, LINE):
                place = (work.block.image, k, work.block.top + row, work.block.left + x)
                self.code.fetch(self.buffers.result, *place)

    def _add_to_panel(self, work: _Work, channels: tir.PrimExpr, bundle: _Bundle, panel: tir.PrimExpr) -> None:
        code, plan = self.code, self.plan
        within = code.let(panel * (plan.panel_vectors * plan.lanes))
        places = [code.let(self._sum(work, bundle, r) + within) for r in range(plan.together)]
        sums = [code.array(plan.panel_vectors, "inside") for _ in places]
        self._begin(work, channels, bundle, places, sums)
        self.products.add(sums, bundle.number, self._operands(work, channels, panel))
        for place, of_row in zip(places, sums, strict=True):
            for t, one in enumerate(of_row):
                code.store(work.sums, one, place + t * plan.lanes)

    def _begin(
        self,
        work: _Work,
        channels: tir.PrimExpr,
        bundle: _Bundle,
        places: Sequence[tir.PrimExpr],
        sums: Sequence[Sequence[tir.BufferLoad]],
    ) -> None:
        """With the bias, or where the block of channels before left off."""
        if self.plan.visits == 1:
            self._begin_with_bias(bundle, sums)
            return
        with self.ib.if_scope(channels == 0):
            self._begin_with_bias(bundle, sums)
        with self.ib.else_scope():
            for place, of_row in zip(places, sums, strict=True):
                for t, one in enumerate(of_row):
                    self.code.set(one, self.code.load(work.sums, place + t * self.plan.lanes))

    def _begin_with_bias(self, bundle: _Bundle, sums: Sequence[Sequence[tir.BufferLoad]]) -> None:
        for r, of_row in enumerate(sums):
            bias = self.code.keep(self.code.splat(self.buffers.bias[self._filter(bundle, r)]))
            for one in of_row:
                self.code.set(one, bias)

    def _operands(self, work: _Work, channels: tir.PrimExpr, panel: tir.PrimExpr) -> Operands:
        """Those of a panel, of a block of channels."""
        plan, geometry = self.plan, self.geometry
        vectors = [plan.operand(t) for t in range(plan.panel_vectors)]
        if work.planes is None:
            # The input, counted through.
            first = work.block.image * geometry.in_channels + channels * plan.channels
            begin = self._far(first) * geometry.in_width + self._far(work.block.left)
            return Operands(self.buffers.data, self.code.let(begin), vectors, plan.unit, (_ZERO, _ZERO, _ZERO))
        begin = work.planes.first + panel * (plan.rows // plan.panels * plan.plane_cols)
        if plan.in_parts:
            begin = channels * (plan.channels * plan.channel_size) + begin
        return Operands(work.planes.buffer, self.code.let(self._far(begin)), vectors)

    @staticmethod
    def _far(index: tir.PrimExpr) -> tir.PrimExpr:
        """In 64 bits, so that what is added to it becomes part of an address."""
        return tir.Cast("int64", index)

    def _finish_bundle(self, work: _Work, bundle: _Bundle) -> None:
        with self.code.loop(self.plan.together, "r") as r:
            k = self.code.let(self._filter(bundle, r))
            self._finish(work, k, self.code.let(self._sum(work, bundle, r)))

    def _finish(self, work: _Work, k: tir.PrimExpr, sums: tir.PrimExpr) -> None:
        """Residual, activation, and the outputs of a block into their image; or the pooled ones."""
        plan, geometry = self.plan, self.geometry
        if self.pooled is not None:
            results = PooledResults(self.code, self.pooled, self.activation, self.buffers.result)
            results.finish(work.block.image, work.number, k, work.sums, sums)
            return
        widths = [_outputs_across(plan, across) for across in range(plan.blocks[1])]
        with self.code.loop(part_of(plan.rows, geometry.out_height, work.block.top), "row") as row:
            place = (work.block.top + row, sums + row * plan.cols)
            each_run(self.ib, work.block.across, widths, partial(self._finish_row, work, k, *place))

    def _finish_row(self, work: _Work, k: tir.PrimExpr, y: tir.PrimExpr, start: tir.PrimExpr, width: int) -> None:
        def finish(code: VectorCode, x: tir.PrimExpr) -> None:
            # An image in one row is counted through.
            at = (work.block.image, k, y, work.block.left + x)
            value = code.load(work.sums, start + x)
            if self.buffers.residual is not None:
                value = value + code.load(self.buffers.residual, *at)
            code.store(self.buffers.result, self.activation.emit(code, value), *at)

        each_vector(self.code, width, finish)


@dataclass(frozen=True)
class _Span:
    """Elements of a row of a plane that are pixels: what is before and behind is zero.

    Attributes:
        begin: the first. count: how many. safe: of how many the pixels up to the next one's are in the image as well.
    """

    begin: int
    count: int
    safe: int


def _spans(plan: DirectPlan, across: int) -> tuple[_Span, ...]:
    """By planes across, in a block."""
    geometry = plan.geometry
    stride, length = geometry.strides[1], plan.plane_cols
    spans = []
    for column in plan.starts:
        # Left of the image by as much as it is below 0.
        first = across * plan.cols * stride + column - geometry.padding[1]
        begin = max(0, min(length, -(first // stride)))
        end = max(begin, min(length, (geometry.in_width - 1 - first) // stride + 1))
        safe = (geometry.in_width - first - begin * stride) // stride
        spans.append(_Span(begin, end - begin, max(0, min(end - begin, safe))))
    return tuple(spans)


def _outputs_across(plan: DirectPlan, across: int) -> int:
    """Columns of a block that are in the image."""
    return min(plan.cols, plan.geometry.out_width - across * plan.cols) if plan.packed else plan.cols
