"""CPU schedules of the two kernels: what is blocked, vectorised, unrolled and run in parallel.

Vector length, registers and caches come from targets.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import te, tir, topi

from . import phases, sparse_direct, sparse_winograd
from .layouts import PhaseLayout
from .targets import CpuFacts, cpu_facts

SKEW = (256, 16)
"""Rows of tile positions are a line (16 floats) more than a multiple of 256 floats apart: at powers of two apart, the
n x n positions of a tile would fight for the same few ways of L1."""

_PARALLEL_BLOCKS = 4
"""With this many blocks or more, blocks run in parallel; with fewer, the stages do one by one, over channels."""

_UNROLLED_PHASES = 8
"""Most planes of one row that are filled in one go."""


@dataclass
class _Kernel:
    """One sparse convolution and its epilogue, in a schedule under construction.

    Attributes:
        stages: the tensors of the convolution, by tag.
        last: the tensor whose loops go over the output pixels; the epilogue is inlined into it.
        layout: the blocks of the convolution.
        tile: a position is tile x tile output pixels.
    """

    schedule: te.Schedule
    stages: dict[str, te.Tensor]
    last: te.Tensor
    layout: PhaseLayout
    tile: int
    cpu: CpuFacts

    def stage(self, tag: str) -> te.Stage:
        return self.schedule[self.stages[tag]]

    @property
    def parallel_blocks(self) -> bool:
        return blocks_in_parallel(int(self.last.shape[0]), self.layout)


def blocks_in_parallel(batch: int, layout: PhaseLayout) -> bool:
    """Whether each block is computed from beginning to end by one thread, with buffers of its own."""
    down, across = layout.blocks
    return batch * down * across >= _PARALLEL_BLOCKS


def schedule_direct(outs: Sequence[te.Tensor], layout: PhaseLayout, target: tvm.target.Target) -> te.Schedule:
    """Schedule a function that holds one sparse direct convolution and ends in `outs`."""
    kernel = _start(outs, sparse_direct.OUTPUT, layout, 1, cpu_facts(target))
    last = kernel.schedule[kernel.last]
    block, channel = _loop_over_blocks(kernel)
    kernel.stage(sparse_direct.PRODUCTS).compute_at(last, channel)
    _accumulate(kernel, sparse_direct.PRODUCTS)
    planes = kernel.stage(phases.PLANES)
    loop = _sort_into_planes(kernel)
    if kernel.parallel_blocks:
        planes.compute_at(last, block)
    else:
        planes.parallel(loop)
    return kernel.schedule


def schedule_winograd(outs: Sequence[te.Tensor], layout: PhaseLayout, m: int, target: tvm.target.Target) -> te.Schedule:
    """Schedule a function that holds one sparse Winograd convolution and ends in `outs`."""
    kernel = _start(outs, sparse_winograd.OUTPUT, layout, m, cpu_facts(target))
    last = kernel.schedule[kernel.last]
    block, channel = _loop_over_blocks(kernel)
    for tag in (sparse_winograd.OUTPUT_ROWS, sparse_winograd.OUTPUT_TILES):
        kernel.stage(tag).compute_at(last, channel)
    _transform_output(kernel)
    products, inputs = kernel.stage(sparse_winograd.PRODUCTS), kernel.stage(sparse_winograd.INPUT)
    in_channel = _transform_input(kernel)
    _sort_into_planes(kernel)
    for tag in (sparse_winograd.INPUT_COLUMNS, phases.PLANES):
        kernel.stage(tag).compute_at(inputs, in_channel)
    _accumulate(kernel, sparse_winograd.PRODUCTS)
    if kernel.parallel_blocks:
        products.compute_at(last, block)
        inputs.compute_at(last, block)
    else:
        products.parallel(products.fuse(*products.op.axis[:6]))
        inputs.parallel(in_channel)
    return kernel.schedule


def _start(outs: Sequence[te.Tensor], output: str, layout: PhaseLayout, tile: int, cpu: CpuFacts) -> _Kernel:
    """Inline the epilogue, into the last tensor if that has the shape of the convolution's."""
    tensors = [outs] if isinstance(outs, te.Tensor) else list(outs)
    schedule = te.create_schedule([t.op for t in tensors])
    ours: dict[str, te.Tensor] = {}
    final = tensors[0]
    for stage in schedule.stages:
        if not isinstance(stage.op, te.ComputeOp):
            continue
        if stage.op.tag.startswith(phases.TAG):
            ours[stage.op.tag] = stage.op.output(0)
        elif stage.op != final.op:
            stage.compute_inline()
    last = ours[output]
    if final.op != last.op:
        if [int(s) for s in final.shape] == [int(s) for s in last.shape]:
            schedule[last].compute_inline()
            last = final
        else:
            topi.x86.schedule_injective_from_existing(schedule, final)
    return _Kernel(schedule, ours, last, layout, tile, cpu)


def _loop_over_blocks(kernel: _Kernel) -> tuple[tir.IterVar, tir.IterVar]:
    """Loops of the last stage: block, output channel, the pixels of the block. Returns the first two, which are one
    where blocks are too few to run in parallel."""
    stage, tile = kernel.schedule[kernel.last], kernel.tile
    n, k, h, w = stage.op.axis
    block_row, row = stage.split(h, kernel.layout.rows * tile)
    block_col, col = stage.split(w, kernel.layout.cols * tile)
    if tile == 1:
        stage.reorder(n, block_row, block_col, k, row, col)
    else:
        tile_row, in_row = stage.split(row, tile)
        stage.reorder(n, block_row, block_col, k, tile_row, in_row, col)
    block = stage.fuse(n, block_row, block_col)
    if not kernel.parallel_blocks:
        block = k = stage.fuse(block, k)
    stage.parallel(block)
    return block, k


def _accumulate(kernel: _Kernel, tag: str) -> None:
    """Products of one row and panel in registers: non-zeros outside, vectors unrolled inside."""
    schedule, products = kernel.schedule, kernel.stages[tag]
    registers = schedule.cache_write(products, "global")
    stage = schedule[products]
    *_, panel, place = stage.op.axis
    schedule[registers].compute_at(stage, panel)
    _vectors(stage, place, kernel.cpu)
    stage = schedule[registers]
    (entry,) = stage.op.reduce_axis
    vector, lane = _vectors(stage, stage.op.axis[-1], kernel.cpu)
    stage.reorder(entry, vector, lane)


def _vectors(stage: te.Stage, axis: tir.IterVar, cpu: CpuFacts) -> tuple[tir.IterVar, tir.IterVar]:
    vector, lane = stage.split(axis, cpu.lanes)
    stage.unroll(vector)
    stage.vectorize(lane)
    return vector, lane


def _transform_input(kernel: _Kernel) -> tir.IterVar:
    """Both passes of the input transform, channel by channel; returns the loop over channels.

    The first pass goes through memory (L1): kept in registers it would have to be unrolled over all n x n positions.
    """
    inputs = kernel.stage(sparse_winograd.INPUT)
    n, by, bx, u, v, c, panel, place = inputs.op.axis
    inputs.storage_align(v, *SKEW)
    vector, lane = inputs.split(place, kernel.cpu.lanes)
    inputs.reorder(n, by, bx, c, panel, vector, u, v, lane)
    inputs.unroll(v)
    inputs.vectorize(lane)
    columns = kernel.stage(sparse_winograd.INPUT_COLUMNS)
    *_, u, j, t = columns.op.axis
    vector, lane = columns.split(t, kernel.cpu.lanes)
    columns.reorder(vector, j, u, lane)
    columns.unroll(u)
    columns.vectorize(lane)
    return inputs.fuse(n, by, bx, c)


def _transform_output(kernel: _Kernel) -> None:
    """Both passes of the output transform, channel by channel."""
    products = kernel.stage(sparse_winograd.PRODUCTS)
    *_, v, _, _, _ = products.op.axis
    products.storage_align(v, *SKEW)
    rows = kernel.stage(sparse_winograd.OUTPUT_ROWS)
    *_, i, v, t = rows.op.axis
    vector, lane = rows.split(t, kernel.cpu.lanes)
    rows.reorder(vector, v, i, lane)
    rows.unroll(i)
    rows.vectorize(lane)
    tiles = kernel.stage(sparse_winograd.OUTPUT_TILES)
    # Interleaving columns is left to LLVM, which makes shuffles of it where a strided vector store of TVM's would not.
    tiles.unroll(tiles.op.axis[-1])


def _sort_into_planes(kernel: _Kernel) -> tir.IterVar:
    """Rows of pixels into planes, as many planes at once as a row feeds; LLVM turns that into shuffles.

    Returns the loop over channels.
    """
    planes, padded = kernel.stage(phases.PLANES), kernel.stage(phases.PADDED)
    *outer, plane, y, x = planes.op.axis
    channel = planes.fuse(*outer)
    if kernel.layout.step == (1, 1):
        padded.compute_inline()
        return channel
    plane_row, plane_col = planes.split(plane, kernel.layout.phases[1])
    planes.reorder(plane_row, y, x, plane_col)
    if kernel.layout.phases[1] <= _UNROLLED_PHASES:
        planes.unroll(plane_col)
    padded.compute_at(planes, channel)
    return channel
