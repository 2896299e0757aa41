"""Sparse Winograd convolution F(m x m, r x r) of images in the tile layout of tiles.py or NCHW: how blocks, channels
and filters are shared out. What is done with them is in winograd_steps.py.

It is written in TIR, not TE: a transform has to stay in registers, which needs its sums named and shared, and the
margins of the layout have to be zeroed by whoever writes the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import tvm
from tvm import te, tir

from .convolution_buffers import Arguments, ConvolutionBuffers, convolution
from .epilogues import Activation
from .targets import CodeFeatures
from .tile_chunks import Chunks
from .tile_images import ImageEnds, Images, why_not_images
from .tile_planes import Planes
from .tiles import CHUNKS
from .vector_code import VectorCode, is_far, part_of
from .winograd_plan import WinogradPlan
from .winograd_steps import Inputs, Own, Reader, Store, WinogradSteps, Writer


def sparse_winograd(
    arguments: Arguments[te.Tensor],
    *,
    plan: WinogradPlan,
    activation: Activation,
    ends: ImageEnds,
    features: CodeFeatures,
) -> te.Tensor:
    """Convolve, add, activate.

    Args:
        arguments: data (N, C, length) in the plan's layout, float32; BundledRows of formats.pack_winograd for the plan;
            bias (K,); residual of the shape of the result.
        ends: which of data and result are images NCHW instead.
        features: of the target.

    Returns:
        (N, K, length) in the plan's layout, zero around the image; or NCHW.

    Raises:
        ValueError: for images NCHW where the kernel cannot read and write them.
    """
    reason = why_not_images(plan) if ends != ImageEnds() else None
    if reason is not None:
        raise ValueError(f"images NCHW: {reason}")
    return convolution(
        "winograd",
        ends.result_shape(plan),
        arguments,
        lambda buffers: _Kernel(buffers, plan, activation, ends, features).emit(),
    )


class _Images(Protocol):
    """Some vectors of tiles, wherever their pixels are; see tile_planes.py, tile_chunks.py and tile_images.py."""

    def reader(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Reader: ...
    def own(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Own: ...
    def writer(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Writer: ...
    def clear(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> None: ...
    def fetch_row(
        self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr, number: tir.PrimExpr
    ) -> None: ...


@dataclass(frozen=True)
class _Block:
    """Some vectors of tiles of one image. first: its first vector, within the image. length: its vectors."""

    image: tir.PrimExpr
    first: tir.PrimExpr
    length: int


class _Kernel:
    """Emits one convolution."""

    def __init__(
        self,
        buffers: ConvolutionBuffers,
        plan: WinogradPlan,
        activation: Activation,
        ends: ImageEnds,
        features: CodeFeatures,
    ) -> None:
        self.buffers = buffers
        self.plan, self.geometry, self.blocking = plan, plan.geometry, plan.blocking
        self.activation, self.ends = activation, ends
        self.ib = tvm.tir.ir_builder.create()
        self.code = VectorCode(self.ib, plan.layout.lanes, features=features)
        self.steps = WinogradSteps(self.code, plan, buffers)

    def emit(self) -> tir.Stmt:
        if self.plan.blocks_in_parallel:
            self._blocks_in_parallel()
        else:
            self._parts_in_parallel()
        return self.ib.get()

    def _blocks_in_parallel(self) -> None:
        plan = self.plan
        with self.code.loop(plan.all_blocks, "block", "parallel") as number:
            inputs = Inputs(self._allocate("V", plan.inputs_size))

            def compute(block: _Block) -> None:
                self._transform(block, tir.const(0, "int32"), inputs)
                self._compute(block, tir.const(0, "int32"), inputs)

            self._of_any_length(number, compute)

    def _parts_in_parallel(self) -> None:
        """Of channels, then of filters; by blocks, so that threads mostly read what they have written."""
        plan = self.plan
        inputs = self._allocate("V", plan.all_blocks * plan.inputs_size)
        for step, parts in ((self._transform, plan.channel_parts), (self._compute, plan.filter_parts)):
            with self.code.loop(plan.all_blocks * parts, "part", "parallel") as i:
                number, part = self.code.let(i // parts), self.code.let(tir.floormod(i, parts))
                own = Inputs(inputs, self.code.let(number * plan.inputs_size))
                self._of_any_length(number, partial(step, part=part, inputs=own))

    def _of_any_length(self, number: tir.PrimExpr, emit: Callable[[_Block], None]) -> None:
        """Emit for a block; some may be a vector shorter."""
        code, blocking = self.code, self.blocking
        image, within = code.let(number // blocking.blocks), code.let(tir.floormod(number, blocking.blocks))
        if blocking.even:
            emit(_Block(image, code.let(within * blocking.vectors), blocking.vectors))
            return
        first, end = (code.let(_share(within + i, blocking.image, blocking.blocks)) for i in (0, 1))
        with self.ib.if_scope(end - first == blocking.vectors):
            emit(_Block(image, first, blocking.vectors))
        with self.ib.else_scope():
            emit(_Block(image, first, blocking.vectors - 1))

    def _transform(self, block: _Block, part: tir.PrimExpr, inputs: Inputs) -> None:
        """A part of the channels."""
        code, plan = self.code, self.plan
        with self.ib.if_scope(part == 0):
            self.steps.clear_fill(inputs)
        source = self._images(block, self.ends.nchw_data)
        first, end = (code.let(_share(part + i, self.geometry.in_channels, plan.channel_parts)) for i in (0, 1))
        with code.loop(end - first, "c") as within:
            c = code.let(first + within)
            self.steps.transform_input(c, block.length, source.reader(self.buffers.data, block.image, c), inputs)

    def _compute(self, block: _Block, part: tir.PrimExpr, inputs: Inputs) -> None:
        """A part of the filters."""
        code, plan = self.code, self.plan
        products = self._allocate("M", plan.positions * plan.product_stride)
        busy = self._busy_positions()
        target, first = self._images(block, self.ends.nchw_result), code.let(part * plan.part_filters)
        with code.loop(len(plan.busy), "number") as number:
            here, following = (code.let(busy.vload([number + ahead])) for ahead in (0, 1))
            fetch = partial(self._fetch_result, block, target, first, number)
            self.steps.multiply(here, following, part, block.length, inputs, products, fetch)
        with code.loop(part_of(plan.part_filters, self.geometry.out_channels, first), "k") as row:
            k = code.let(first + row)
            target.clear(self.buffers.result, block.image, k)
            self.steps.transform_output(k, row, block.length, products, self._writer(target, block.image, k))

    def _fetch_result(
        self, block: _Block, target: _Images, first: tir.PrimExpr, number: tir.PrimExpr, bundle: tir.PrimExpr
    ) -> None:
        """What will be written of as many filters as are in a bundle, a share at each position: products need only what
        is near."""
        code, plan, together = self.code, self.plan, self.plan.blocking.together
        if not (code.features.fetch and self._is_far(self.geometry.out_channels)):
            return
        rows = block.length * plan.layout.m
        share = -(-together * rows // len(plan.busy))
        for i in range(share):
            row = code.let(number * share + i)
            with self.ib.if_scope(row < together * rows):
                k = code.let(first + bundle * together + row // rows)
                target.fetch_row(self.buffers.result, block.image, k, code.let(tir.floormod(row, rows)))

    def _is_far(self, channels: int) -> bool:
        """Whether an image of so many channels is."""
        return is_far(channels * self.plan.layout.length)

    def _allocate(self, name: str, elements: int) -> tir.Buffer:
        return self.ib.allocate("float32", elements, name=name, scope="global")._buffer

    def _busy_positions(self) -> tir.Buffer:
        """And behind them once more the last, for what is fetched ahead."""
        busy = self.plan.busy
        positions = self.ib.allocate("int32", len(busy) + 1, name="busy", scope="global")._buffer
        for number, position in enumerate([*busy, busy[-1]]):
            self.ib.emit(tir.BufferStore(positions, tir.const(position, "int32"), [number]))
        return positions

    def _images(self, block: _Block, nchw: bool) -> _Images:
        layout = self.plan.layout
        if layout.form != CHUNKS:
            return Planes(self.code, layout, block.first, block.length)
        far = self._is_far(self.geometry.in_channels)
        return (Images if nchw else Chunks)(self.code, layout, block.first, block.length, fetch=far)

    def _writer(self, target: _Images, image: tir.PrimExpr, k: tir.PrimExpr) -> Writer:
        """Of finished pixels of a filter."""
        code, buffers, write = self.code, self.buffers, target.writer(self.buffers.result, image, k)

        def at_vector(vector: tir.PrimExpr) -> Store:
            store = write(vector)
            residual = None
            if buffers.residual is not None:
                residual = target.own(buffers.residual, image, k)(vector)

            def finish(i: int, j: int, value: tir.PrimExpr) -> None:
                if residual is not None:
                    value = value + residual(i, j)
                store(i, j, code.keep(self.activation.emit(code, value)))

            return finish

        return at_vector


def _share(number: tir.PrimExpr, of: int, parts: int) -> tir.PrimExpr:
    """Where the part of this number begins, of parts as equal as can be. The product may need 64 bits."""
    return tir.Cast("int32", tir.Cast("int64", number) * of // parts)
