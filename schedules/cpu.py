"""CPU schedule of sparse direct convolution: what is blocked, vectorised, unrolled and run in parallel.

Vector length, registers and caches come from targets.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import te, tir, topi

from . import phases, sparse_direct
from .layouts import PhaseLayout
from .targets import CpuFacts, cpu_facts

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
    """

    schedule: te.Schedule
    stages: dict[str, te.Tensor]
    last: te.Tensor
    layout: PhaseLayout
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
    kernel = _start(outs, sparse_direct.OUTPUT, layout, cpu_facts(target))
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


def _start(outs: Sequence[te.Tensor], output: str, layout: PhaseLayout, cpu: CpuFacts) -> _Kernel:
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
    return _Kernel(schedule, ours, last, layout, cpu)


def _loop_over_blocks(kernel: _Kernel) -> tuple[tir.IterVar, tir.IterVar]:
    """Loops of the last stage: block, output channel, the pixels of the block. Returns the first two, which are one
    where blocks are too few to run in parallel."""
    stage = kernel.schedule[kernel.last]
    n, k, h, w = stage.op.axis
    block_row, row = stage.split(h, kernel.layout.rows)
    block_col, col = stage.split(w, kernel.layout.cols)
    stage.reorder(n, block_row, block_col, k, row, col)
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
