"""Sparse Winograd convolution F(m x m, r x r) of images in the tile layout of tiles.py or NCHW: how blocks, channels,
positions and filters are shared out. What is done with them is in winograd_steps.py.

It is written in TIR, not TE: a transform has to stay in registers, which needs its sums named and shared, and the
margins of the layout have to be zeroed by whoever writes the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from .tile_single import Single
from .tiles import CHUNKS, SINGLE
from .vector_code import VectorCode, is_far, share_of
from .winograd_plan import WinogradPlan
from .winograd_steps import Own, Reader, Store, WinogradSteps, Writer


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
    """Some vectors of tiles, wherever their pixels are: see the modules tile_*.py."""

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


@dataclass(frozen=True)
class _Work:
    """What a thread does of a block: a part of each step."""

    inputs: tir.Buffer
    products: tir.Buffer
    part: tir.PrimExpr = field(default_factory=lambda: tir.const(0, "int32"))


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
        with self.code.loop(self.plan.all_blocks, "block", "parallel") as number:
            work = _Work(*self._between())

            def compute(block: _Block) -> None:
                for step in self._each_step:
                    step(work, block)

            self._of_any_length(number, compute)

    def _parts_in_parallel(self) -> None:
        """Of one block after the other, so that what is in between stays in L2."""
        inputs, products = self._between()
        with self.code.loop(self.plan.all_blocks, "block") as number:
            for step in self._each_step:
                with self.code.loop(self.plan.parts, "part", "parallel") as part:
                    self._of_any_length(number, partial(step, _Work(inputs, products, part)))

    def _between(self) -> tuple[tir.Buffer, tir.Buffer]:
        """Room for the transformed input of a block, and for its products."""
        return self._allocate("V", self.plan.inputs_size), self._allocate("M", self.plan.products_size)

    @property
    def _each_step(self) -> tuple[Callable[[_Work, _Block], None], ...]:
        return self._transform_input, self._multiply, self._transform_output

    def _of_any_length(self, number: tir.PrimExpr, emit: Callable[[_Block], None]) -> None:
        """Emit for a block; some may be a vector shorter."""
        code, blocking = self.code, self.blocking
        image, within = code.let(number // blocking.blocks), code.let(tir.floormod(number, blocking.blocks))
        if blocking.even:
            emit(_Block(image, code.let(within * blocking.vectors), blocking.vectors))
            return
        first, end = (code.let(share_of(within + i, blocking.image, blocking.blocks)) for i in (0, 1))
        with self.ib.if_scope(end - first == blocking.vectors):
            emit(_Block(image, first, blocking.vectors))
        with self.ib.else_scope():
            emit(_Block(image, first, blocking.vectors - 1))

    def _transform_input(self, work: _Work, block: _Block) -> None:
        """Of a part of the channels."""
        with self.ib.if_scope(work.part == 0):
            self.steps.clear_fill(work.inputs)
        source = self._images(block, self.ends.nchw_data)
        with self._part_of(self.geometry.in_channels, work, "c") as c:
            reader = source.reader(self.buffers.data, block.image, c)
            self.steps.transform_input(c, block.length, reader, work.inputs)

    def _multiply(self, work: _Work, block: _Block) -> None:
        """At a part of the positions, which are dealt out: neighbours have about as many weights."""
        code, parts, busy = self.code, self.plan.parts, self._busy_positions()
        fetch_result = self._fetcher_of_result(block)
        with code.loop((len(self.plan.busy) - work.part + (parts - 1)) // parts, "i") as i:
            number = code.let(work.part + i * parts)
            here, following = (code.let(busy.vload([number + ahead])) for ahead in (0, parts))
            fetch = partial(fetch_result, number)
            self.steps.multiply(here, following, block.length, work.inputs, work.products, fetch)

    def _transform_output(self, work: _Work, block: _Block) -> None:
        """Of a part of the filters."""
        target = self._images(block, self.ends.nchw_result)
        with self._part_of(self.geometry.out_channels, work, "k") as k:
            target.clear(self.buffers.result, block.image, k)
            self.steps.transform_output(k, block.length, work.products, self._writer(target, block.image, k))

    @contextmanager
    def _part_of(self, count: int, work: _Work, name: str) -> Iterator[tir.PrimExpr]:
        """A loop over a part of so many."""
        code = self.code
        first, end = (code.let(share_of(work.part + i, count, self.plan.parts)) for i in (0, 1))
        with code.loop(end - first, name) as within:
            yield code.let(first + within)

    def _fetcher_of_result(self, block: _Block) -> Callable[[tir.PrimExpr, tir.PrimExpr], None]:
        """(number of a busy position, bundle) -> emits a share of what fetches the lines that are to be written, of as
        many filters as are in a bundle: products need only what is near."""
        code, plan, together = self.code, self.plan, self.plan.blocking.together
        if not (code.features.fetch and self._is_far(self.geometry.out_channels)):
            return lambda number, bundle: None
        target = self._images(block, self.ends.nchw_result)
        rows = block.length * plan.layout.m
        share = -(-together * rows // len(plan.busy))

        def fetch(number: tir.PrimExpr, bundle: tir.PrimExpr) -> None:
            for i in range(share):
                row = code.let(number * share + i)
                with self.ib.if_scope(row < together * rows):
                    k = code.let(bundle * together + row // rows)
                    target.fetch_row(self.buffers.result, block.image, k, code.let(tir.floormod(row, rows)))

        return fetch

    def _is_far(self, channels: int) -> bool:
        """Whether an image of so many channels is."""
        return is_far(channels * self.plan.layout.length)

    def _allocate(self, name: str, elements: int) -> tir.Buffer:
        return self.ib.allocate("float32", elements, name=name, scope="global")._buffer

    def _busy_positions(self) -> tir.Buffer:
        """And behind them the last, for what is fetched ahead."""
        busy, parts = self.plan.busy, self.plan.parts
        positions = self.ib.allocate("int32", len(busy) + parts, name="busy", scope="global")._buffer
        for number, position in enumerate([*busy, *[busy[-1]] * parts]):
            self.ib.emit(tir.BufferStore(positions, tir.const(position, "int32"), [number]))
        return positions

    def _images(self, block: _Block, nchw: bool) -> _Images:
        layout = self.plan.layout
        if layout.form == SINGLE:
            return Single(self.code, layout)
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
