"""Windows along a row: every column of every window, and nothing read beyond the row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import te, tir

from jointsparse.schedules import operators  # noqa: F401  (readies LLVM)
from jointsparse.schedules.row_windows import RowWindows, longest
from jointsparse.schedules.vector_code import VectorCode
from tests.schedules.tiled import run

FILL = -5.0

cases = given(
    width=st.integers(1, 70),
    first=st.integers(-20, 20),
    stride=st.integers(1, 6),
    size=st.integers(1, 6),
    count=st.integers(1, 40),
    lanes=st.sampled_from([1, 4, 8, 16]),
)


def columns_of(source: te.Tensor, windows: RowWindows) -> te.Tensor:
    """A row for each column of the windows."""

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        ib = tvm.tir.ir_builder.create()

        def store(code: VectorCode, x: tir.PrimExpr, columns: Sequence[tir.PrimExpr]) -> None:
            for col, value in enumerate(columns):
                code.store(outs[0], value, col, x)

        windows.emit(ib, lambda code, x: code.load(ins[0], x), store)
        return ib.get()

    return te.extern([(windows.size, windows.count)], [source], emit, dtype="float32")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@cases
def test_columns(width: int, first: int, stride: int, size: int, count: int, lanes: int) -> None:
    windows = RowWindows(width, first, stride, size, count, FILL, lanes)
    row = np.arange(1, width + 1, dtype=np.float32)
    source = te.placeholder(row.shape, name="row")
    pixels = first + np.arange(count) * stride + np.arange(size)[:, None]
    expected = np.where((pixels >= 0) & (pixels < width), row[np.clip(pixels, 0, width - 1)], FILL)
    np.testing.assert_array_equal(run([row], [source], columns_of(source, windows)), expected)


@settings(max_examples=200, deadline=None, derandomize=True)
@cases
def test_nothing_is_read_beyond_the_row(width: int, first: int, stride: int, size: int, count: int, lanes: int) -> None:
    source = te.placeholder((width,), name="row")
    result = columns_of(source, RowWindows(width, first, stride, size, count, FILL, lanes))
    analyzer, loads = tvm.arith.Analyzer(), []

    def visit(node: tvm.Object) -> None:
        if isinstance(node, tir.For):
            analyzer.bind(node.loop_var, tvm.ir.Range(node.min, node.min + node.extent))
        elif isinstance(node, tir.BufferLoad) and node.buffer.name == "row":
            (index,) = node.indices
            loads.append((index.base, int(index.lanes)) if isinstance(index, tir.Ramp) else (index, 1))

    tir.stmt_functor.post_order_visit(result.op.body, visit)
    assert loads or first >= width
    for base, elements in loads:
        bound = analyzer.const_int_bound(base)
        assert bound.min_value >= 0
        assert bound.max_value + elements <= width


@pytest.mark.parametrize(
    ("lanes", "elements", "expected"), [(16, 100, 16), (16, 16, 16), (16, 15, 8), (8, 7, 4), (4, 1, 1), (1, 9, 1)]
)
def test_longest_vector(lanes: int, elements: int, expected: int) -> None:
    assert longest(lanes, elements) == expected
