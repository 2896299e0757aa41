"""Reading and writing an image in planes (see tiles.py) from a kernel."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tir

from .geometry import round_up
from .tiles import TileLayout
from .vector_code import VectorCode
from .winograd_steps import Load, Own, Pixels, Reader, Store, Writer

_NOWHERE = 2**30
"""Row or column of a place that is no tile's."""


class Planes:
    """Some vectors of an image; code that finds the pixels of their tiles is emitted here.

    Args:
        first: first vector, counted from the image's.
        vectors: how many.
    """

    def __init__(self, code: VectorCode, layout: TileLayout, first: tir.PrimExpr, vectors: int) -> None:
        self.code, self.layout, self.first, self.vectors = code, layout, first, vectors
        self.place = layout.margin + first * layout.lanes
        self.rows, self.cols = self._pixels_of_places()

    def _pixels_of_places(self) -> tuple[tir.Buffer, tir.Buffer]:
        """First row and column of the tile at each place, and of the vectors before and behind."""
        places, layout = (self.vectors + 2) * self.layout.lanes, self.layout
        rows = self.code.ib.allocate("int32", places, name="rows", scope="global")
        cols = self.code.ib.allocate("int32", places, name="cols", scope="global")
        with self.code.loop(places, "place") as i:
            # Counted from a row of tiles further up, for the division to be one of positive numbers.
            place = self.place + i - layout.lanes
            above = round_up(layout.margin, layout.cols) - layout.margin
            row, col = (place + above) // layout.cols, tir.floormod(place + above, layout.cols)
            first = (layout.margin + above) // layout.cols
            is_tile = tir.all(row >= first, row < first + layout.grid[0], col < layout.grid[1])
            rows[i] = tir.Select(is_tile, (row - first) * layout.m, _NOWHERE)
            cols[i] = tir.Select(is_tile, col * layout.m, _NOWHERE)
        return rows._buffer, cols._buffer

    def reader(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Reader:
        """Of a channel: pixels of a vector's tiles and around them."""
        own = self.own(buffer, image, channel)
        return lambda vector, reach: Pixels(own(vector), range(-reach, self.layout.m + reach))

    def own(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Own:
        """Of a channel: pixels of a vector's tiles."""

        def at_vector(vector: tir.PrimExpr) -> Load:
            place = self.place + vector
            return lambda row, col: self.code.load(buffer, image, channel, place + self.layout.locate(row, col))

        return at_vector

    def writer(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Writer:
        """Of a channel: pixels of a vector's tiles, zero where they are not of the image; in a spread layout they may
        lie beside the neighbouring tiles too."""
        code, layout = self.code, self.layout

        def at_vector(vector: tir.PrimExpr) -> Store:
            place = self.place + vector

            def store(i: int, j: int, value: tir.PrimExpr) -> None:
                for col in layout.columns:
                    if col % layout.m == j:
                        to = -(col // layout.m)  # the tile whose column `col` this is, counted from the pixel's own
                        kept = self._inside(vector + to, i, col, value)
                        code.store(buffer, kept, image, channel, layout.plane(i, col) + place + to)

            return store

        return at_vector

    def fetch_row(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr, number: tir.PrimExpr) -> None:
        """Before it is written, of a channel: row ``number % m`` of vector ``number // m``, without what lies beside
        tiles as well."""
        code, layout = self.code, self.layout
        place = code.let(self.place + number // layout.m * layout.lanes)
        row = code.let(tir.floormod(number, layout.m))
        for col in range(layout.m):
            code.fetch(buffer, image, channel, place + layout.plane(row, col))

    def _inside(self, vector: tir.PrimExpr, i: int, col: int, value: tir.PrimExpr) -> tir.PrimExpr:
        """Zero where pixel (i, col) of the tiles from a place on is not of the image."""
        code, layout = self.code, self.layout
        rows, cols = (code.load(pixels, layout.lanes + vector) for pixels in (self.rows, self.cols))
        inside = tir.And(rows < code.splat(layout.height - i, "int32"), cols < code.splat(layout.width - col, "int32"))
        if col < 0:
            inside = tir.And(inside, cols >= code.splat(-col, "int32"))
        return tir.Select(inside, value, code.splat(0.0))

    def clear(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> None:
        """What is before the image's first vector, or behind its last one, in a channel."""
        code, layout = self.code, self.layout

        def clear(start: int, stop: int, planes: int = layout.planes) -> None:
            with code.loop(planes, "plane") as plane:
                for place in range(start, stop, layout.lanes):
                    code.store(buffer, code.splat(0.0), image, channel, plane * layout.stride + place)

        def clear_edge(place: int, columns: Sequence[int]) -> None:
            """What no neighbour writes: the first tile has none to its left, the last place none to its right."""
            for col in columns:
                for row in range(layout.m):
                    at = [image, channel, layout.plane(row, col) + place]
                    code.ib.emit(tir.BufferStore(buffer, tir.const(0, "float32"), at))

        with code.ib.if_scope(self.first == 0):
            clear(0, layout.margin)
            clear_edge(layout.margin, [col for col in layout.columns if col < 0])
        with code.ib.if_scope(self.first + self.vectors == layout.vectors):
            clear(layout.end, layout.stride)
            clear(layout.length - layout.margin, layout.length, planes=1)
            clear_edge(layout.end - 1, [col for col in layout.columns if col >= layout.m])
