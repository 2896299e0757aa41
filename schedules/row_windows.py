"""Windows along a row of pixels, several at once: a vector for each of their columns.

Whole vectors of the row are loaded, nowhere beyond it, and what the windows read is put together of them in registers.
Vectors that begin anywhere could also be loaded from a buffer that has columns added around the row, but those that
span two just stored must wait until these have reached the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tvm
from tvm import tir

from .geometry import round_up
from .vector_code import VectorCode

Load = Callable[[VectorCode, tir.PrimExpr], tir.PrimExpr]
"""(code, x): the vector from pixel x of the row on."""

Emit = Callable[[VectorCode, tir.PrimExpr, Sequence[tir.PrimExpr]], None]
"""(code, x, columns): for the windows from x on, a vector for each of their columns."""


@dataclass(frozen=True)
class RowWindows:
    """Windows that follow each other along a row.

    Attributes:
        width: pixels of the row.
        first: where the first window begins, counted from the row's first pixel.
        stride: pixels from a window to the next. size: pixels of a window.
        count: windows.
        fill: value of a pixel beside the row.
        lanes: of a vector of the CPU.
    """

    width: int
    first: int
    stride: int
    size: int
    count: int
    fill: float
    lanes: int

    @property
    def reading(self) -> int:
        """Lanes of the vectors of the row."""
        return longest(self.lanes, self.width)

    @property
    def together(self) -> int:
        """Windows at once: lanes of their vectors."""
        return longest(self.reading, self.count)

    def emit(self, ib: tvm.tir.ir_builder.IRBuilder, load: Load | None, emit: Emit) -> None:
        """Emit for all windows, the last of which may be done twice; without `load` no pixel is in the row."""
        reading, code = VectorCode(ib, self.reading), VectorCode(ib, self.together)

        def vector(x: int, moved: tir.PrimExpr | int) -> None:
            """From window `x` + `moved` on; what is read lies as for `x`."""
            at = moved * self.stride
            sources = (
                {} if load is None else {start: reading.keep(load(reading, start + at)) for start in self._sources(x)}
            )
            first = self._pixels(x).start
            emit(code, x + moved, [self._column(sources, first + col) for col in range(self.size)])

        whole = range(0, self.count - self.together + 1, self.together)
        inner = [x for x in whole if self._is_inner(x)]
        for x in whole:
            if x not in inner:
                vector(x, 0)
            elif x == inner[0]:
                with reading.loop(len(inner), "v") as v:
                    vector(x, v * self.together)
        if self.count % self.together:
            vector(self.count - self.together, 0)

    def _pixels(self, x: int) -> range:
        """In the row or beside it: what the windows from `x` on read."""
        first = self.first + x * self.stride
        return range(first, first + (self.together - 1) * self.stride + self.size)

    def _is_inner(self, x: int) -> bool:
        """Whether all vectors loaded for the windows from `x` on are in the row, one behind the other."""
        pixels = self._pixels(x)
        return pixels.start >= 0 and pixels.start + round_up(len(pixels), self.reading) <= self.width

    def _sources(self, x: int) -> list[int]:
        """Where the vectors begin that hold the pixels that are read. At each edge they are the same for all `x`, for
        LLVM to load them once."""
        pixels, last = self._pixels(x), self.width - self.reading
        if pixels.stop <= self.width:
            return [min(start, last) for start in range(max(pixels.start, 0), max(pixels.stop, 1), self.reading)]
        return [max(start, 0) for start in range(last, max(pixels.start, 0) - self.reading, -self.reading)]

    def _column(self, sources: Mapping[int, tir.PrimExpr], first: int) -> tir.PrimExpr:
        """Every stride-th pixel from `first` on."""
        lanes, pixels = self.reading, [first + i * self.stride for i in range(self.together)]
        # Of the fullest sources first, for the vector to be made of as few as possible.
        fullest = sorted(sources, key=lambda start: -sum(pixel - start in range(lanes) for pixel in pixels))
        found = [next((start for start in fullest if pixel - start in range(lanes)), None) for pixel in pixels]
        used = list(dict.fromkeys(found))
        fill = tir.const(self.fill, "float32" if lanes == 1 else f"float32x{lanes}")
        vectors = [fill if start is None else sources[start] for start in used]
        order = [
            used.index(start) * lanes + (0 if start is None else pixel - start)
            for start, pixel in zip(found, pixels, strict=True)
        ]
        return vectors[0] if order == list(range(lanes)) else tir.Shuffle(vectors, order)


def longest(lanes: int, elements: int) -> int:
    """Lanes of the longest vector that fits into so many elements."""
    return 1 << min(lanes, elements).bit_length() - 1
