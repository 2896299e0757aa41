"""Max pooling of NCHW images: rows of a window first, then columns; TVM's own schedule goes over every window anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import tvm
from tvm import te, tir

from .row_code import each_run
from .row_windows import RowWindows
from .vector_code import VectorCode

LOWEST = float(tir.min_value("float32").value)
"""What stands for a pixel beside the image."""


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

    def has_empty_windows(self, size: tuple[int, int]) -> bool:
        """Whether some window has no pixel of an image of this size (height, width)."""
        each = zip(self.pool, self.strides, self.padding, self.out, size, strict=True)
        return any(pool <= before or (out - 1) * stride - before >= end for pool, stride, before, out, end in each)


def max_pool2d(data: te.Tensor, geometry: PoolGeometry, lanes: int) -> te.Tensor:
    """The largest of each window.

    Args:
        data: (N, C, H, W) float32.
        lanes: of a vector.

    Returns:
        (N, C, output height, output width).
    """
    batch, channels, height, width = (int(s) for s in data.shape)
    (_, cols), (down, right), (above, left) = geometry.pool, geometry.strides, geometry.padding
    inside = [rows_inside(geometry, y, height) for y in range(geometry.out[0])]
    windows = RowWindows(width, -left, right, cols, geometry.out[1], fill=LOWEST, lanes=lanes)

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        (image,), (result,) = ins, outs
        ib = tvm.tir.ir_builder.create()

        def emit_row(channel: Sequence[tir.PrimExpr], y: tir.PrimExpr, taps: Sequence[int]) -> None:
            def largest_row(code: VectorCode, x: tir.PrimExpr) -> tir.PrimExpr:
                return reduce(tir.Max, [code.load(image, *channel, y * down - above + tap, x) for tap in taps])

            def largest_column(code: VectorCode, x: tir.PrimExpr, columns: Sequence[tir.PrimExpr]) -> None:
                code.store(result, reduce(tir.Max, columns), *channel, y, x)

            windows.emit(ib, largest_row if taps else None, largest_column)

        with ib.for_range(0, batch * channels, name="channel", kind="parallel") as i:
            channel = [i // channels, tir.floormod(i, channels)]
            with ib.for_range(0, geometry.out[0], name="y") as y:
                each_run(ib, y, inside, partial(emit_row, channel, y))
        return ib.get()

    return te.extern([(batch, channels, *geometry.out)], [data], emit, name="max_pool2d", dtype="float32")


def rows_inside(geometry: PoolGeometry, y: int, height: int) -> tuple[int, ...]:
    """Rows of a window of row `y` of the result that are in the image."""
    top = y * geometry.strides[0] - geometry.padding[0]
    return tuple(tap for tap in range(geometry.pool[0]) if 0 <= top + tap < height)
