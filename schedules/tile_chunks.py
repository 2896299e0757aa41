"""Reading and writing an image in chunks (see tiles.py) from a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tvm import tir

from .tiles import TileLayout
from .vector_code import LINE, VectorCode
from .winograd_steps import Load, Own, Pixels, Reader, Store, Writer

_AROUND = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))
"""Chunks that a vector of tiles reads, by rows of tiles and vectors from its own."""


class Chunks:
    """Some vectors of an image; code that finds the chunks around them is emitted here.

    Args:
        first: first vector, counted from the image's.
        vectors: how many.
        fetch: whether readers have near by what the vectors behind these will read.
    """

    def __init__(
        self, code: VectorCode, layout: TileLayout, first: tir.PrimExpr, vectors: int, *, fetch: bool = False
    ) -> None:
        self.code, self.layout, self.first, self.vectors, self.fetch = code, layout, first, vectors, fetch
        self.size = layout.planes * layout.lanes
        self.around = code.ib.allocate("int32", vectors * len(_AROUND), name="around", scope="global")._buffer
        across, (rows, _) = layout.cols // layout.lanes, layout.grid
        with code.loop(vectors, "t") as t:
            number = code.let(first + t)
            row, col = code.let(number // across), code.let(tir.floormod(number, across))
            for i, (down, right) in enumerate(_AROUND):
                there = tir.all(row + down >= 0, row + down < rows, col + right >= 0, col + right < across)
                chunk = 1 + number + (down * across + right)
                place = tir.Select(there, chunk * self.size, tir.const(0, "int32"))
                code.ib.emit(tir.BufferStore(self.around, place, [t * len(_AROUND) + i]))

    def reader(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Reader:
        """Of a channel: pixels of a vector's tiles and around them."""
        code, layout, lanes = self.code, self.layout, self.layout.lanes

        def at_vector(vector: tir.PrimExpr, reach: int) -> Pixels:
            first = code.let(vector // lanes * len(_AROUND))
            chunks = {key: code.let(self.around.vload([first + i])) for i, key in enumerate(_AROUND)}
            if self.fetch:
                behind = self._chunk(vector + self.vectors * lanes)
                for element in range(0, self.size, LINE):
                    code.fetch(buffer, image, channel, behind + element)

            def load(row: int, col: int) -> tir.PrimExpr:
                (down, i), (right, j) = divmod(row, layout.m), divmod(col, layout.m)
                return code.load(buffer, image, channel, chunks[down, right] + layout.plane(i, j))

            return Pixels(load, range(-reach, layout.m + reach), partial(self._columns, reach))

        return at_vector

    def _columns(self, reach: int, loaded: Sequence[tir.PrimExpr]) -> list[tir.PrimExpr]:
        """Columns beyond a tile were loaded as those of the vectors of tiles beside."""
        m, lanes = self.layout.m, self.layout.lanes
        left, own, right = loaded[:reach], loaded[reach : reach + m], loaded[reach + m :]
        before = [self.code.shifted(other, one, lanes - 1) for other, one in zip(left, own[m - reach :], strict=True)]
        behind = [self.code.shifted(one, other, 1) for one, other in zip(own, right, strict=False)]
        return [*before, *own, *behind]

    def own(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Own:
        """Of a channel: pixels of a vector's tiles."""

        def at_vector(vector: tir.PrimExpr) -> Load:
            chunk = self._chunk(vector)
            return lambda i, j: self.code.load(buffer, image, channel, chunk + self.layout.plane(i, j))

        return at_vector

    def writer(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Writer:
        """Of a channel: pixels of a vector's tiles, zero where they are not of the image."""
        code, layout, lanes = self.code, self.layout, self.layout.lanes
        across = layout.cols // lanes

        def at_vector(vector: tir.PrimExpr) -> Store:
            number = code.let(self.first + vector // lanes)
            chunk = self._chunk(vector)
            row, col = code.let(number // across * layout.m), code.let(tir.floormod(number, across) * lanes * layout.m)

            def store(i: int, j: int, value: tir.PrimExpr) -> None:
                value = self._inside(row, col, i, j, value)
                code.store(buffer, value, image, channel, chunk + layout.plane(i, j))

            return store

        return at_vector

    def fetch_row(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr, number: tir.PrimExpr) -> None:
        """Before it is written, of a channel: row ``number % m`` of vector ``number // m``."""
        code, m, lanes = self.code, self.layout.m, self.layout.lanes
        first = code.let(self._chunk(number // m * lanes) + tir.floormod(number, m) * (m * lanes))
        for element in range(0, m * lanes, LINE):
            code.fetch(buffer, image, channel, first + element)

    def _chunk(self, vector: tir.PrimExpr) -> tir.PrimExpr:
        """Where that of a vector is; the first of all is not of the image."""
        return self.code.let((1 + self.first + vector // self.layout.lanes) * self.size)

    def _inside(self, row: tir.PrimExpr, col: tir.PrimExpr, i: int, j: int, value: tir.PrimExpr) -> tir.PrimExpr:
        """Zero where pixel (i, j) of the tiles whose first is at (row, col) is not of the image."""
        layout, lanes = self.layout, self.layout.lanes
        full_rows, full_cols = layout.height == layout.grid[0] * layout.m, layout.width == layout.cols * layout.m
        if full_rows and full_cols:
            return value
        end = layout.width - j - col
        if not full_rows:
            end = tir.Select(row + i < layout.height, end, tir.const(0, "int32"))
        place = tir.Ramp(0, layout.m, lanes) if lanes > 1 else tir.const(0, "int32")
        return tir.Select(place < self.code.splat(end, "int32"), value, self.code.splat(0.0))

    def clear(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> None:
        """The chunk of zeros of a channel, if these are the image's first vectors."""
        code, layout = self.code, self.layout
        with code.ib.if_scope(self.first == 0), code.loop(layout.planes, "plane") as plane:
            code.store(buffer, code.splat(0.0), image, channel, plane * layout.lanes)
