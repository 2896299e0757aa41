"""Code for rows of pixels whose lengths are known: whole vectors, then shorter ones.

Left to itself LLVM makes gathers and scatters of loops over short rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar

import tvm
from tvm import tir

from .vector_code import VectorCode

T = TypeVar("T")

Place = tuple[tir.Buffer, Sequence[tir.PrimExpr], tir.PrimExpr]
"""A buffer, all indices but the last, the last."""


def each_vector(code: VectorCode, count: int, emit: Callable[[VectorCode, tir.PrimExpr], None]) -> None:
    """Emit for vectors that make up `count` elements.

    Args:
        emit: given code for vectors of a length, and the first element of one.
    """
    whole = count // code.lanes
    if whole:
        with code.loop(whole, "v") as v:
            emit(code, v * code.lanes)
    at, lanes = whole * code.lanes, code.lanes
    while at < count:
        lanes //= 2
        if count - at >= lanes:
            emit(VectorCode(code.ib, lanes), tir.const(at, "int32"))
            at += lanes


def copy_every(code: VectorCode, source: Place, target: Place, stride: int, count: int, safe: int) -> None:
    """Copy every stride-th element from `source` on.

    Args:
        count: elements to copy. safe: for how many of them all elements up to the next may be read.
    """
    if stride > 2:
        with code.loop(count, "x") as x:
            code.ib.emit(_copied(VectorCode(code.ib, 1), source, target, stride, x))
        return
    paired = count if stride == 1 else safe
    each_vector(code, paired, lambda vector, x: code.ib.emit(_copied(vector, source, target, stride, x)))
    for x in range(paired, count):
        code.ib.emit(_copied(VectorCode(code.ib, 1), source, target, stride, tir.const(x, "int32")))


def _copied(code: VectorCode, source: Place, target: Place, stride: int, x: tir.PrimExpr) -> tir.Stmt:
    (image, outer, first), (buffer, around, start) = source, target
    value, *_ = code.split_columns(image, stride, *outer, first + x * stride)
    return tir.BufferStore(buffer, value, code.places(*around, start + x))


def each_run(
    ib: tvm.tir.ir_builder.IRBuilder, index: tir.PrimExpr, values: Sequence[T], emit: Callable[[T], None]
) -> None:
    """Emit for ``values[index]``: a branch for each run of equal values."""
    runs, end = [], 0
    for value, equal in groupby(values):
        end += len(list(equal))
        runs.append((end, value))
    _branches(ib, index, runs, emit)


def _branches(
    ib: tvm.tir.ir_builder.IRBuilder, index: tir.PrimExpr, runs: Sequence[tuple[int, T]], emit: Callable[[T], None]
) -> None:
    (end, value), *others = runs
    if not others:
        emit(value)
        return
    with ib.if_scope(index < end):
        emit(value)
    with ib.else_scope():
        _branches(ib, index, others, emit)
