"""Max pooling of NCHW images: columns of a window first, then rows; TVM's own schedule goes over every window anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import tvm
from tvm import te, tir
from tvm.tir.ir_builder import BufferVar, IRBuilder

_LOWEST = tir.min_value("float32")


@dataclass(frozen=True)
class PoolGeometry:
    """A 2-D pooling of NCHW data.

    Attributes:
        pool, strides: (height, width).
        padding: above and left of the image. Below and right windows reach as far as `out` demands.
        out: (height, width) of the result.
    """

    pool: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int]
    out: tuple[int, int]


def max_pool2d(data: te.Tensor, geometry: PoolGeometry) -> te.Tensor:
    """The largest of each window.

    Args:
        data: (N, C, H, W) float32.

    Returns:
        (N, C, output height, output width).
    """
    batch, channels, _, width = (int(s) for s in data.shape)
    (rows, cols), (down, right) = geometry.pool, geometry.strides
    (above, left), (out_height, out_width) = geometry.padding, geometry.out
    line_width = max(left + width, (out_width - 1) * right + cols)

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        (image,), (result,) = ins, outs
        ib = tvm.tir.ir_builder.create()
        with ib.for_range(0, batch * channels, name="channel", kind="parallel") as i:
            n, c = i // channels, tir.floormod(i, channels)
            line = ib.allocate("float32", line_width, name="line", scope="global")
            _fill(ib, line, 0, left)
            _fill(ib, line, left + width, line_width)
            with ib.for_range(0, out_height, name="y") as y:
                _largest_of_columns(ib, line, left, image, [n, c], y * down - above, rows)
                with ib.for_range(0, out_width, name="x") as x:
                    largest = reduce(tir.Max, [line[x * right + col] for col in range(cols)])
                    ib.emit(tir.BufferStore(result, largest, [n, c, y, x]))
        return ib.get()

    shape = (batch, channels, out_height, out_width)
    return te.extern([shape], [data], emit, name="max_pool2d", dtype="float32")


def _fill(ib: IRBuilder, line: BufferVar, start: int, stop: int) -> None:
    with ib.for_range(0, stop - start, name="x") as x:
        line[start + x] = _LOWEST


def _largest_of_columns(
    ib: IRBuilder,
    line: BufferVar,
    left: int,
    image: tir.Buffer,
    channel: Sequence[tir.PrimExpr],
    top: tir.PrimExpr,
    rows: int,
) -> None:
    """Into `line` from `left` on, for each column of the image, the largest of its rows from `top` on."""
    height, width = (int(s) for s in image.shape[2:])
    with ib.if_scope(tir.all(top >= 0, top + rows <= height)), ib.for_range(0, width, name="x") as x:
        line[left + x] = reduce(tir.Max, [image[(*channel, top + r, x)] for r in range(rows)])
    with ib.else_scope():
        _fill(ib, line, left, left + width)
        for r in range(rows):
            is_inside = tir.all(top + r >= 0, top + r < height)
            with ib.if_scope(is_inside), ib.for_range(0, width, name="x") as x:
                line[left + x] = tir.Max(line[left + x], image[(*channel, top + r, x)])
