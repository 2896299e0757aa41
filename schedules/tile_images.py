"""Reading and writing images NCHW from a kernel that computes their tiles in chunks (see tiles.py).

A row of pixels of a vector of tiles is a few vectors that follow each other. Columns of tiles are every m-th of their
pixels: they are taken apart after the transform of columns, when fewer rows are left, and put together again to be
written.

How many of a vector of pixels are of the image is known beforehand, for every place, where one chunk is as wide as the
image (then it may also be half of one) or chunks fill rows; else it is all or none of them, by the place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tvm import tir

from .tiles import CHUNKS, TileLayout
from .vector_code import LINE, VectorCode
from .winograd_plan import WinogradPlan
from .winograd_steps import Load, Own, Pixels, Reader, Store, Writer


def why_not_images(plan: WinogradPlan) -> str | None:
    """Why the kernel cannot read and write images NCHW, or None if it can."""
    layout = plan.layout
    if layout.form != CHUNKS:
        return "tiles are not in chunks"
    if layout.lanes < 2 * layout.m:
        return "vectors are too short"
    if layout.width % layout.lanes == 0 or (layout.cols == layout.lanes and layout.width % (layout.lanes // 2) == 0):
        return None
    return "rows are not whole vectors"


_VECTOR = 16
"""Lanes from which on taking columns apart costs less than a layout of its own for what lies between layers."""

_APART = 1 << 16
"""No multiple of so many bytes should lie between channels: all would fight for the same ways of L2. In tiles they are
further apart than their pixels, by what surrounds an image."""


def prefers_images(plan: WinogradPlan) -> bool:
    """Whether the kernel is faster with images NCHW than with tiles. Measured on x86 with 64 to 256 channels of 56 to
    256 pixels, and with 32 of 720 x 1280."""
    channel = 4 * plan.layout.height * plan.layout.width
    return why_not_images(plan) is None and plan.layout.lanes >= _VECTOR and channel % _APART > 0


@dataclass(frozen=True)
class ImageEnds:
    """Which images of a Winograd convolution are NCHW, and not in its tile layout; a residual is like the result."""

    nchw_data: bool = False
    nchw_result: bool = False

    def data_shape(self, plan: WinogradPlan) -> tuple[int, ...]:
        """(N, C, H, W) or (N, C, length)."""
        geometry = plan.geometry
        if self.nchw_data:
            return geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width
        return plan.layout.shape(geometry.batch, geometry.in_channels)

    def result_shape(self, plan: WinogradPlan) -> tuple[int, ...]:
        """(N, K, H, W) or (N, K, length)."""
        if self.nchw_result:
            return plan.geometry.out_shape
        return plan.layout.shape(plan.geometry.batch, plan.geometry.out_channels)


@dataclass(frozen=True)
class _Place:
    """Of a vector of tiles in its image. top, left: its first pixel."""

    top: tir.PrimExpr
    left: tir.PrimExpr


class Images:
    """Some vectors of tiles of an image.

    Args:
        layout: in chunks.
        first: first vector, counted from the image's.
        vectors: how many.
        fetch: whether readers have near by what the vectors behind these will read.
    """

    def __init__(
        self, code: VectorCode, layout: TileLayout, first: tir.PrimExpr, vectors: int, *, fetch: bool = False
    ) -> None:
        self.code, self.layout, self.first, self.vectors, self.fetch = code, layout, first, vectors, fetch
        self.across = layout.cols // layout.lanes

    def reader(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Reader:
        """Of a channel: pixels of a vector's tiles and around them."""

        def at_vector(vector: tir.PrimExpr, reach: int) -> Pixels:
            if self.fetch:
                self._fetch(buffer, image, channel, self._place(vector, self.vectors), reach)
            place, m = self._place(vector), self.layout.m
            rows = {i: self._row(place, i) for i in range(-reach, m + reach)}
            load = partial(self._load, buffer, (image, channel), rows, place)
            return Pixels(load, range(-1, m + 1), partial(self._columns, reach))

        return at_vector

    def own(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Own:
        """Of a channel: pixels of a vector's tiles."""

        def at_vector(vector: tir.PrimExpr) -> Load:
            place, m = self._place(vector), self.layout.m
            rows = {i: self._row(place, i) for i in range(m)}
            load = partial(self._load, buffer, (image, channel), rows, place)
            known: dict[int, list[tir.PrimExpr]] = {}

            def pixels(i: int, j: int) -> tir.PrimExpr:
                if i not in known:
                    columns = self.code.columns([load(i, piece) for piece in range(m)])
                    known[i] = [self.code.keep(column) for column in columns]
                return known[i][j]

            return pixels

        return at_vector

    def writer(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> Writer:
        """Of a channel: pixels of a vector's tiles, row by row."""

        def at_vector(vector: tir.PrimExpr) -> Store:
            place = self._place(vector)
            row: list[tir.PrimExpr] = []

            def store(i: int, j: int, value: tir.PrimExpr) -> None:
                row.append(value)
                if len(row) == self.layout.m:
                    self._write_row(buffer, (image, channel), place, i, row)
                    row.clear()

            return store

        return at_vector

    def clear(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr) -> None:
        """There is nothing around an image."""

    def fetch_row(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr, number: tir.PrimExpr) -> None:
        """Before it is written, of a channel: row ``number % m`` of vector ``number // m``."""
        code, m = self.code, self.layout.m
        place = self._place(code.let(number // m * self.layout.lanes))
        y = code.let(place.top + tir.floormod(number, m))
        for x in range(0, m * self.layout.lanes, LINE):
            code.fetch(buffer, image, channel, y, place.left + x)

    def _place(self, vector: tir.PrimExpr, ahead: int = 0) -> _Place:
        code, layout = self.code, self.layout
        number = code.let(self.first + vector // layout.lanes + ahead)
        top = code.let(number // self.across * layout.m)
        return _Place(top, code.let(tir.floormod(number, self.across) * (layout.lanes * layout.m)))

    def _fetch(self, buffer: tir.Buffer, image: tir.PrimExpr, channel: tir.PrimExpr, place: _Place, reach: int) -> None:
        """What a vector reads, but for its first rows: with them 3x3 is 2 % faster, 5x5 10 % slower. Without those
        above, which the row of tiles before has read, 3x3 takes 15 % longer."""
        m = self.layout.m
        for i in (*range(-reach, 0), *range(reach, m + reach)):
            for piece in range(m):
                self.code.fetch(buffer, image, channel, place.top + i, place.left + piece * self.layout.lanes)

    def _row(self, place: _Place, i: int) -> tuple[tir.PrimExpr, tir.PrimExpr | None]:
        """Row i of a vector's tiles: (the nearest of the image, whether it is that; None: always)."""
        y, layout = place.top + i, self.layout
        if 0 <= i < layout.m - (-layout.height % layout.m):
            return self.code.let(y), None
        nearest = self.code.let(tir.max(0, tir.min(y, layout.height - 1)))
        return nearest, nearest == y

    def _load(
        self,
        buffer: tir.Buffer,
        outer: Sequence[tir.PrimExpr],
        rows: Mapping[int, tuple[tir.PrimExpr, tir.PrimExpr | None]],
        place: _Place,
        i: int,
        piece: int,
    ) -> tir.PrimExpr:
        """Pixels of a row, zero where they are not of the image."""
        code, (y, is_row) = self.code, rows[i]
        known = self._known_pixels(piece)
        if known == 0:
            return code.splat(0.0)
        if known is None:
            x = place.left + piece * code.lanes
            nearest = tir.max(0, tir.min(x, self.layout.width - code.lanes))
            value, is_column = code.load(buffer, *outer, y, nearest), nearest == x
            condition = is_column if is_row is None else tir.And(is_row, is_column)
        else:
            value, condition = self._load_pixels(buffer, (*outer, y, place.left + piece * code.lanes), known), is_row
        if condition is None:
            return value
        return tir.Select(tir.Broadcast(condition, code.lanes), value, code.splat(0.0))

    def _load_pixels(self, buffer: tir.Buffer, at: Sequence[tir.PrimExpr], pixels: int) -> tir.PrimExpr:
        """A vector, or half of one and zeros."""
        if pixels == self.code.lanes:
            return self.code.load(buffer, *at)
        half = VectorCode(self.code.ib, pixels)
        return tir.Shuffle([half.load(buffer, *at), half.splat(0.0)], list(range(self.code.lanes)))

    def _known_pixels(self, piece: int) -> int | None:
        """How many of a vector of pixels are of the image, in any row; None if that differs from place to place."""
        layout, lanes = self.layout, self.layout.lanes
        if self.across == 1:
            return 0 if piece < 0 else max(0, min(lanes, layout.width - piece * lanes))
        if 0 <= piece < layout.m and layout.width % (lanes * layout.m) == 0:
            return lanes
        return None

    def _columns(self, reach: int, loaded: Sequence[tir.PrimExpr]) -> list[tir.PrimExpr]:
        code, lanes, m = self.code, self.layout.lanes, self.layout.m
        left, *pieces, right = loaded
        own = [code.keep(column) for column in code.columns(pieces)]
        before = [
            tir.Shuffle([left, own[col + m]], [lanes + col, *range(lanes, 2 * lanes - 1)]) for col in range(-reach, 0)
        ]
        behind = [tir.Shuffle([own[col], right], [*range(1, lanes), lanes + col]) for col in range(reach)]
        return [*before, *own, *behind]

    def _write_row(
        self,
        buffer: tir.Buffer,
        outer: Sequence[tir.PrimExpr],
        place: _Place,
        i: int,
        columns: Sequence[tir.PrimExpr],
    ) -> None:
        code, layout = self.code, self.layout
        pieces = [code.keep(piece) for piece in code.pieces(columns)]
        y = place.top + i

        def write() -> None:
            for number, piece in enumerate(pieces):
                self._write(buffer, (*outer, y), place.left + number * code.lanes, number, piece)

        if i < layout.m - (-layout.height % layout.m):
            write()
            return
        with code.ib.if_scope(y < layout.height):
            write()

    def _write(
        self, buffer: tir.Buffer, outer: Sequence[tir.PrimExpr], x: tir.PrimExpr, number: int, piece: tir.PrimExpr
    ) -> None:
        """A vector of pixels, as far as it is of the image."""
        code, known = self.code, self._known_pixels(number)
        if known is None:
            with code.ib.if_scope(x < self.layout.width):
                code.store(buffer, piece, *outer, x)
        elif known == code.lanes:
            code.store(buffer, piece, *outer, x)
        elif known:
            half = VectorCode(code.ib, known)
            half.store(buffer, tir.Shuffle([piece], list(range(known))), *outer, x)
