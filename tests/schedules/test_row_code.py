"""Rows of known lengths: every element once, nothing read beyond what is there."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import te, tir

from jointsparse.schedules import operators  # noqa: F401  (readies LLVM)
from jointsparse.schedules.direct_plan import DirectPlan
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.row_code import copy_every, each_run, each_vector
from jointsparse.schedules.sparse_direct import _spans
from jointsparse.schedules.vector_code import VectorCode

COUNTS = [0, 1, 2, 3, 7, 8, 13, 16, 31, 32, 33]
each_length = pytest.mark.parametrize("lanes", [1, 4, 8, 16])


def run(source: np.ndarray, shape: tuple[int, ...], body: object) -> np.ndarray:
    data = te.placeholder(source.shape, name="data")
    result = te.extern([shape], [data], lambda ins, outs: body(ins[0], outs[0]), dtype="float32")  # type: ignore[operator]
    kernel = tvm.build(te.create_schedule(result.op), [data, result], "llvm")
    out = tvm.nd.array(np.full(shape, -1, np.float32))
    kernel(tvm.nd.array(source), out)
    return out.numpy()


@each_length
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_copies(lanes: int, stride: int) -> None:
    source = np.arange(1, 120, dtype=np.float32)

    def body(data: tir.Buffer, out: tir.Buffer) -> tir.Stmt:
        ib = tvm.tir.ir_builder.create()
        for i, count in enumerate(COUNTS):
            place, target = (data, (), tir.const(5, "int32")), (out, (tir.const(i, "int32"),), tir.const(2, "int32"))
            copy_every(VectorCode(ib, lanes), place, target, stride, count, max(0, count - 1))
        return ib.get()

    out = run(source, (len(COUNTS), 40), body)
    for row, count in zip(out, COUNTS, strict=True):
        np.testing.assert_array_equal(row[2 : 2 + count], source[5 : 5 + count * stride : stride])
        assert (np.delete(row, np.arange(2, 2 + count)) == -1).all()


@each_length
@pytest.mark.parametrize("count", COUNTS)
def test_vectors_make_up_a_row(lanes: int, count: int) -> None:
    """The longest first, each shorter length once at most."""
    seen: list[int] = []
    ib = tvm.tir.ir_builder.create()
    each_vector(VectorCode(ib, lanes), count, lambda code, x: seen.append(code.lanes))
    whole = count // lanes
    assert seen[: min(whole, 1)] == [lanes] * min(whole, 1)
    shorter = seen[min(whole, 1) :]
    assert sum(shorter) == count % lanes
    assert shorter == sorted(set(shorter), reverse=True)


def test_runs() -> None:
    values = [3, 3, 1, 1, 1, 3, 2]

    def body(data: tir.Buffer, out: tir.Buffer) -> tir.Stmt:
        ib = tvm.tir.ir_builder.create()
        with ib.for_range(0, len(values), name="i") as i:
            each_run(ib, i, values, lambda value: ib.emit(tir.BufferStore(out, tir.const(value, "float32"), [i])))
        return ib.get()

    np.testing.assert_array_equal(run(np.zeros(1, np.float32), (len(values),), body), values)


@given(
    width=st.integers(1, 40),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    cols=st.sampled_from([4, 8, 16]),
    shifted=st.booleans(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_spans_are_the_pixels(
    width: int, kernel: int, stride: int, dilation: int, padding: tuple[int, int], cols: int, shifted: bool
) -> None:
    left, right = padding
    width = max(width, dilation * (kernel - 1) + 1 - left - right)
    geometry = ConvGeometry(1, 1, 1, width, 1, (1, kernel), (1, stride), (0, left, 0, right), (1, dilation))
    plan = DirectPlan(geometry, 4, 1, cols, 1, 1, shifted)
    for across in range(plan.blocks[1]):
        for start, span in zip(plan.starts, _spans(plan, across), strict=True):
            pixels = (across * cols + np.arange(plan.plane_cols)) * stride + start - left
            inside = np.flatnonzero((pixels >= 0) & (pixels < width))
            np.testing.assert_array_equal(inside, np.arange(span.begin, span.begin + span.count) if span.count else [])
            assert 0 <= span.safe <= span.count
            # All up to the next are in the image, or there is only one.
            read = pixels[span.begin : span.begin + span.safe]
            assert stride > 2 or (read + stride - 1 < width).all()
