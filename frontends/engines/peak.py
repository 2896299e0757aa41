"""The most multiply-adds that a core does in a second, measured: a loop of them on registers alone."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import te

from ...schedules import llvm_workaround  # noqa: F401  # makes LLVM build here
from ...schedules.targets import cpu_facts
from .base import NATIVE
from .tvm_build import TvmBuild

STEPS = 2**20
"""Of the loop: some milliseconds."""


def multiply_adds(isa: str = NATIVE, repeat: int = 20) -> float:
    """Float32 multiply-adds a second of one core, the best of ``repeat`` measurements."""
    target = tvm.target.Target(TvmBuild("auto", "").target(isa))
    facts = cpu_facts(target)
    size = facts.accumulators * facts.lanes
    loop = tvm.build(*_chains(facts.lanes, size), target)
    data = tvm.nd.array(np.full(size, 0.5, np.float32))
    result = tvm.nd.array(np.zeros(size, np.float32))
    seconds = loop.time_evaluator(loop.entry_name, tvm.cpu(), number=1, repeat=repeat)(data, result).min
    return STEPS * size / seconds


def _chains(lanes: int, size: int) -> tuple[te.Schedule, list[te.Tensor]]:
    """x <- x a + a in every lane of every accumulator, which nothing can shorten: each step needs the last."""
    step = te.comm_reducer(lambda x, a: x * a + a, lambda dtype: tvm.tir.const(0, dtype))
    a = te.placeholder((size,), "float32", "a")
    k = te.reduce_axis((0, STEPS), "k")
    y = te.compute((size,), lambda i: step(a[i], axis=k), "y")
    schedule = te.create_schedule(y.op)
    registers = schedule.cache_write(y, "local")
    axis, reduction = registers.op.axis[0], registers.op.reduce_axis[0]
    accumulator, lane = schedule[registers].split(axis, lanes)
    schedule[registers].reorder(reduction, accumulator, lane)
    schedule[registers].unroll(accumulator)
    schedule[registers].vectorize(lane)
    return schedule, [a, y]
