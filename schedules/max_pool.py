"""Max pooling of NCHW images: rows of a window first, then columns; TVM's own schedule goes over every window anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import tvm
from tvm import te, tir

from .geometry import round_up
from .row_code import each_run
from .vector_code import VectorCode

_LOWEST = float(tir.min_value("float32").value)


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


def max_pool2d(data: te.Tensor, geometry: PoolGeometry, lanes: int) -> te.Tensor:
    """The largest of each window.

    Args:
        data: (N, C, H, W) float32.
        lanes: of a vector.

    Returns:
        (N, C, output height, output width).
    """
    batch, channels, height, width = (int(s) for s in data.shape)
    inside = [_inside(geometry, y, height) for y in range(geometry.out[0])]
    reading = _longest(lanes, width)
    writing = _longest(reading, geometry.out[1])

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        ib = tvm.tir.ir_builder.create()
        with ib.for_range(0, batch * channels, name="channel", kind="parallel") as i:
            channel = [i // channels, tir.floormod(i, channels)]
            with ib.for_range(0, geometry.out[0], name="y") as y:

                def emit_row(taps: Sequence[int]) -> None:
                    codes = VectorCode(ib, reading), VectorCode(ib, writing)
                    _Row(*codes, geometry, ins[0], outs[0], channel, y, taps).emit()

                each_run(ib, y, inside, emit_row)
        return ib.get()

    return te.extern([(batch, channels, *geometry.out)], [data], emit, name="max_pool2d", dtype="float32")


def _longest(lanes: int, elements: int) -> int:
    """Lanes of the longest vector that fits into a row."""
    return 1 << min(lanes, elements).bit_length() - 1


def _inside(geometry: PoolGeometry, y: int, height: int) -> tuple[int, ...]:
    """Rows of a window of row `y` of the result that are in the image."""
    top = y * geometry.strides[0] - geometry.padding[0]
    return tuple(tap for tap in range(geometry.pool[0]) if 0 <= top + tap < height)


@dataclass(frozen=True)
class _Row:
    """Emits a row of the result, vector by vector; the last one may overlap the one before it.

    Of the image whole vectors are loaded, nowhere beyond a row of it, and what the windows of a vector of the result
    read is put together of them. Vectors that begin anywhere could also be loaded from a buffer with columns added
    around the image, but those that span two just stored must wait until these have reached the cache.

    Attributes:
        reading: code for vectors no longer than a row of the image.
        writing: for vectors no longer than these, nor than a row of the result.
        channel, y: of the row.
        taps: rows of the windows that are in the image.
    """

    reading: VectorCode
    writing: VectorCode
    geometry: PoolGeometry
    image: tir.Buffer
    result: tir.Buffer
    channel: Sequence[tir.PrimExpr]
    y: tir.PrimExpr
    taps: Sequence[int]

    @property
    def width(self) -> int:
        return int(self.image.shape[3])

    def emit(self) -> None:
        width, lanes = self.geometry.out[1], self.writing.lanes
        whole = range(0, width - lanes + 1, lanes)
        inner = [x for x in whole if self._is_inner(x)]
        for x in whole:
            if x not in inner:
                self._vector(x, 0)
            elif x == inner[0]:
                with self.reading.loop(len(inner), "v") as v:
                    self._vector(x, v * lanes)
        if width % lanes:
            self._vector(width - lanes, 0)

    def _columns(self, x: int) -> range:
        """Of the image, or beside it: what the windows from `x` on read."""
        stride, first = self.geometry.strides[1], x * self.geometry.strides[1] - self.geometry.padding[1]
        return range(first, first + (self.writing.lanes - 1) * stride + self.geometry.pool[1])

    def _is_inner(self, x: int) -> bool:
        """Whether all vectors loaded for the windows from `x` on are in the image, one behind the other."""
        columns = self._columns(x)
        return columns.start >= 0 and columns.start + round_up(len(columns), self.reading.lanes) <= self.width

    def _sources(self, x: int) -> list[int]:
        """Where the vectors begin that hold the columns that are read. At each edge they are the same for all `x`, for
        LLVM to load them once."""
        columns, lanes = self._columns(x), self.reading.lanes
        last = self.width - lanes
        if columns.stop <= self.width:
            return [min(start, last) for start in range(max(columns.start, 0), max(columns.stop, 1), lanes)]
        return [max(start, 0) for start in range(last, max(columns.start, 0) - lanes, -lanes)]

    def _vector(self, x: int, moved: tir.PrimExpr | int) -> None:
        """A vector of the result, from `x` + `moved` on; what is read lies as for `x`."""
        stride, first = self.geometry.strides[1], self._columns(x).start
        sources = {start: self._largest(start + moved * stride) for start in self._sources(x)}
        columns = [
            self._picked(sources, range(first + col, first + col + self.writing.lanes * stride, stride))
            for col in range(self.geometry.pool[1])
        ]
        self.writing.store(self.result, reduce(tir.Max, columns), *self.channel, self.y, x + moved)

    def _largest(self, x: tir.PrimExpr | int) -> tir.PrimExpr:
        """For each column of a vector the largest of the rows."""
        code = self.reading
        if not self.taps:
            return code.splat(_LOWEST)
        top = self.y * self.geometry.strides[0] - self.geometry.padding[0]
        return code.keep(reduce(tir.Max, [code.load(self.image, *self.channel, top + tap, x) for tap in self.taps]))

    def _picked(self, sources: Mapping[int, tir.PrimExpr], columns: range) -> tir.PrimExpr:
        """A vector of these columns, the lowest number where they are not of the image."""
        lanes = self.reading.lanes
        # Of the fullest sources first, for the vector to be made of as few as possible.
        fullest = sorted(sources, key=lambda start: -sum(column - start in range(lanes) for column in columns))
        found = [next((start for start in fullest if column - start in range(lanes)), None) for column in columns]
        used = list(dict.fromkeys(found))
        order = [
            used.index(start) * lanes + (0 if start is None else column - start)
            for start, column in zip(found, columns, strict=True)
        ]
        vectors = [self.reading.splat(_LOWEST) if start is None else sources[start] for start in used]
        return vectors[0] if order == list(range(lanes)) else tir.Shuffle(vectors, order)
