"""Reading and writing an image all of whose tiles are the lanes of one vector (see tiles.py) from a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tvm import tir

from .tiles import TileLayout
from .vector_code import VectorCode
from .winograd_steps import Load, Own, Pixels, Reader, Store, Writer


class Single:
    """The only vector of an image. What is beside a tile is in another lane, or zero."""

    def __init__(self, code: VectorCode, layout: TileLayout) -> None:
        self.code, self.layout = code, layout

    def reader(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Reader:
        """Of a channel: pixels of the tiles and around them."""
        layout = self.layout

        def load(row: int, number: int) -> tir.PrimExpr:
            down, i = divmod(row, layout.m)
            return self._beside(self.code.load(buffer, image, channel, layout.plane(i, number)), down, 0)

        return lambda vector, reach: Pixels(load, range(layout.m), partial(self._columns, reach))

    def _columns(self, reach: int, own: Sequence[tir.PrimExpr]) -> list[tir.PrimExpr]:
        """Columns beyond a tile are those of the tiles beside."""
        m = self.layout.m
        each = ((*divmod(column, m), column) for column in range(-reach, m + reach))
        return [own[j] if right == 0 else self.code.keep(self._beside(own[j], 0, right)) for right, j, _ in each]

    def _beside(self, value: tir.PrimExpr, down: int, right: int) -> tir.PrimExpr:
        """For each tile, what the tile so far from it has; zero where there is none."""
        rows, cols = self.layout.grid

        def source(lane: int) -> int | None:
            row, col = divmod(lane, cols)
            there = row < rows and 0 <= row + down < rows and 0 <= col + right < cols
            return lane + down * cols + right if there else None

        return self._from_lanes(value, source)

    def _from_lanes(self, value: tir.PrimExpr, source: Callable[[int], int | None]) -> tir.PrimExpr:
        """A vector of these lanes; None for zero."""
        lanes = self.layout.lanes
        order = [source(lane) for lane in range(lanes)]
        if order == list(range(lanes)):
            return value
        return tir.Shuffle([value, self.code.splat(0.0)], [lanes if place is None else place for place in order])

    def own(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Own:
        """Of a channel: pixels of the tiles."""

        def at_vector(vector: tir.PrimExpr) -> Load:
            return lambda i, j: self.code.load(buffer, image, channel, self.layout.plane(i, j))

        return at_vector

    def writer(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Writer:
        """Of a channel: pixels of the tiles, zero where they are not of the image."""

        def store(i: int, j: int, value: tir.PrimExpr) -> None:
            self.code.store(buffer, self._inside(i, j, value), image, channel, self.layout.plane(i, j))

        def at_vector(vector: tir.PrimExpr) -> Store:
            return store

        return at_vector

    def _inside(self, i: int, j: int, value: tir.PrimExpr) -> tir.PrimExpr:
        """Zero where pixel (i, j) of a tile is not of the image."""
        layout = self.layout

        def source(lane: int) -> int | None:
            row, col = divmod(lane, layout.cols)
            return lane if row * layout.m + i < layout.height and col * layout.m + j < layout.width else None

        return self._from_lanes(value, source)

    def fetch_row(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr, number: tir.PrimExpr) -> None:
        """Before it is written, of a channel: row `number` of the tiles."""
        layout = self.layout
        for col in range(layout.m):
            place = self.code.let((number * layout.m + col) * layout.lanes)
            self.code.fetch(buffer, image, channel, place)

    def clear(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> None:
        """Nothing lies around the tiles."""
