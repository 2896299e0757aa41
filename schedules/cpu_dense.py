"""CPU schedule of the sparse fully-connected layer: the stages around its kernel, which is TIR already."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import te, topi

from . import sparse_dense
from .targets import cpu_facts

_INPUTS_AT_ONCE = 256
"""Inputs transposed by one thread at a time."""


def schedule_dense(outs: Sequence[te.Tensor], target: tvm.target.Target) -> te.Schedule:
    """Schedule a function that holds one sparse fully-connected layer and ends in `outs`."""
    tensors = [outs] if isinstance(outs, te.Tensor) else list(outs)
    schedule = te.create_schedule([t.op for t in tensors])
    final, lanes = tensors[0], cpu_facts(target).lanes
    for stage in schedule.stages:
        if isinstance(stage.op, te.ComputeOp) and stage.op.tag == sparse_dense.COLUMNS:
            _transpose(stage, lanes)
        elif isinstance(stage.op, te.ComputeOp) and stage.op != final.op:
            stage.compute_inline()
    if isinstance(final.op, te.ComputeOp):
        _epilogue(schedule, final, lanes)
    return schedule


def _transpose(stage: te.Stage, lanes: int) -> None:
    """Into vectors of images, several inputs at a time."""
    block, channel, image = stage.op.axis
    outer, inner = stage.split(channel, _INPUTS_AT_ONCE)
    vector, lane = stage.split(image, min(lanes, int(image.dom.extent)))
    stage.reorder(block, outer, inner, vector, lane)
    stage.parallel(stage.fuse(block, outer))
    stage.vectorize(lane)


def _epilogue(schedule: te.Schedule, final: te.Tensor, lanes: int) -> None:
    """Too little work to start threads for."""
    if len(final.op.axis) != 2:
        topi.x86.schedule_injective_from_existing(schedule, final)
        return
    stage = schedule[final]
    _, lane = stage.split(stage.op.axis[1], lanes)
    stage.vectorize(lane)
