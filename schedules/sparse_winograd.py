"""Sparse Winograd convolution F(m x m, r x r) of images in the tile layout of tiles.py or NCHW, block by block; what is
done with a block is in winograd_steps.py.

It is written in TIR, not TE: a transform has to stay in registers, which needs its sums named and shared, and the
margins of the layout have to be zeroed by whoever writes the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import tvm
from tvm import te, tir

from .convolution_buffers import Arguments, ConvolutionBuffers, convolution
from .epilogues import Activation
from .tile_chunks import Chunks
from .tile_images import ImageEnds, Images, why_not_images
from .tile_planes import Planes
from .tiles import CHUNKS
from .vector_code import VectorCode
from .winograd_plan import WinogradPlan
from .winograd_steps import Own, Reader, Store, WinogradSteps, Writer


def sparse_winograd(
    arguments: Arguments[te.Tensor],
    *,
    plan: WinogradPlan,
    activation: Activation,
    ends: ImageEnds,
    prefetch: bool,
) -> te.Tensor:
    """Convolve, add, activate.

    Args:
        arguments: data (N, C, length) in the plan's layout, float32; BundledRows of formats.pack_winograd for the plan;
            bias (K,); residual of the shape of the result.
        ends: which of data and result are images NCHW instead.
        prefetch: whether code for the target can fetch ahead.

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
        lambda buffers: _Kernel(buffers, plan, activation, ends, prefetch).emit(),
    )


_FAR = 1 << 22
"""Bytes of an image that is to be fetched ahead: from a larger L2 than there is, of less it hardly gains anything."""


class _Images(Protocol):
    """Some vectors of tiles, wherever their pixels are; see tile_planes.py, tile_chunks.py and tile_images.py."""

    def reader(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Reader: ...
    def own(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Own: ...
    def writer(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Writer: ...
    def clear(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> None: ...


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
        prefetch: bool,
    ) -> None:
        self.buffers = buffers
        self.plan, self.geometry, self.blocking = plan, plan.geometry, plan.blocking
        self.activation, self.ends = activation, ends
        self.ib = tvm.tir.ir_builder.create()
        self.code = VectorCode(self.ib, plan.layout.lanes, prefetch=prefetch)
        self.steps = WinogradSteps(self.code, plan, buffers)

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
        first = self.code.let(number * whole)
        if whole == last:
            self._block(_Block(image, first, whole), kind)
            return
        with self.ib.if_scope(number < self.blocking.blocks - 1):
            self._block(_Block(image, first, whole), kind)
        with self.ib.else_scope():
            self._block(_Block(image, first, last), kind)

    def _block(self, block: _Block, kind: str) -> None:
        """All three steps; each goes over what can be done in parallel, `kind` says whether it is."""
        code, plan, steps, buffers = self.code, self.plan, self.steps, self.buffers
        inputs = self.ib.allocate("float32", plan.positions * plan.input_stride, name="V", scope="global")._buffer
        products = self.ib.allocate("float32", plan.positions * plan.product_stride, name="M", scope="global")._buffer
        source = target = self._images(block, self.ends.nchw_data)
        if self.ends.nchw_result != self.ends.nchw_data:
            target = self._images(block, self.ends.nchw_result)
        with code.loop(self.geometry.in_channels, "c", kind) as c:
            steps.transform_input(c, block.length, source.reader(buffers.data, block.image, c), inputs)
        busy = self._busy_positions()
        with code.loop(len(plan.busy), "number", kind) as number:
            here, following = (code.let(busy.vload([number + ahead])) for ahead in (0, 1))
            steps.multiply(here, following, block.length, inputs, products)
        with code.loop(self.geometry.out_channels, "k", kind) as k:
            target.clear(buffers.result, block.image, k)
            steps.transform_output(k, block.length, products, self._writer(target, block.image, k))

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
        far = 4 * self.geometry.in_channels * layout.length > _FAR
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
