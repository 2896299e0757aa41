"""Images into the tile layout of tiles.py and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import tvm
from tvm import te, tir
from tvm.tir.ir_builder import IRBuilder

from .tiles import SPREAD, TileLayout

_Copy = Callable[[int, int, tir.PrimExpr, tir.PrimExpr | int, tir.PrimExpr | int], tir.Stmt]
"""Copies pixel (row, column) of a tile: (down, run, place within the run)."""


def to_tiles(data: te.Tensor, layout: TileLayout, offset: tuple[int, int] = (0, 0)) -> te.Tensor:
    """Lay images out in tiles.

    Args:
        data: (N, C, H, W) float32.
        offset: (down, right) from a pixel of the data to the same pixel of the layout's image. What then lies beside
            the image is kept as far as a filter reaches, zeros elsewhere; that needs a spread layout.

    Returns:
        (N, C, length).
    """
    batch, channels, height, width = (int(s) for s in data.shape)
    down, right = offset
    assert offset == (0, 0) or layout.form == SPREAD
    reached = (-layout.halo, layout.grid[0] * layout.m + layout.halo)
    rows = [
        _common(_tiles_with(row, *reached, layout.m), _tiles_with(row - down, 0, height, layout.m))
        for row in range(layout.m)
    ]
    columns = {
        col: _common(range(layout.grid[1]), _tiles_with(col - right, 0, width, layout.m)) for col in layout.columns
    }

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        (image,), (tiles,) = ins, outs
        ib = tvm.tir.ir_builder.create()
        with ib.for_range(0, batch * channels, name="channel", kind="parallel") as i:
            n, c = i // channels, tir.floormod(i, channels)

            def copy(row: int, col: int, ty: tir.PrimExpr, run: tir.PrimExpr | int, x: tir.PrimExpr | int) -> tir.Stmt:
                tx = run * layout.run + x
                pixel = image[n, c, ty * layout.m + (row - down), tx * layout.m + (col - right)]
                return tir.BufferStore(tiles, pixel, [n, c, _element(layout, row, col, ty, run, x)])

            _clear(ib, tiles, [n, c])
            _each_pixel(ib, rows, columns, layout.run, copy)
        return ib.get()

    return te.extern([layout.shape(batch, channels)], [data], emit, name="tiles", dtype="float32")


def from_tiles(tiles: te.Tensor, layout: TileLayout) -> te.Tensor:
    """The images (N, C, height, width) of a tensor in tile layout."""
    batch, channels = (int(s) for s in tiles.shape[:2])
    rows = [_tiles_with(row, 0, layout.height, layout.m) for row in range(layout.m)]
    columns = {col: _tiles_with(col, 0, layout.width, layout.m) for col in range(layout.m)}

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        (source,), (image,) = ins, outs
        ib = tvm.tir.ir_builder.create()
        with ib.for_range(0, batch * channels, name="channel", kind="parallel") as i:
            n, c = i // channels, tir.floormod(i, channels)

            def copy(row: int, col: int, ty: tir.PrimExpr, run: tir.PrimExpr | int, x: tir.PrimExpr | int) -> tir.Stmt:
                pixel, tx = source[n, c, _element(layout, row, col, ty, run, x)], run * layout.run + x
                return tir.BufferStore(image, pixel, [n, c, ty * layout.m + row, tx * layout.m + col])

            _each_pixel(ib, rows, columns, layout.run, copy)
        return ib.get()

    shape = (batch, channels, layout.height, layout.width)
    return te.extern([shape], [tiles], emit, name="image", dtype="float32")


def _element(
    layout: TileLayout, row: int, col: int, ty: tir.PrimExpr, run: tir.PrimExpr | int, x: tir.PrimExpr | int
) -> tir.PrimExpr:
    first = layout.margin + ty * layout.cols + run * layout.run
    return first * layout.step + layout.plane(row, col) + x


def _clear(ib: IRBuilder, tiles: tir.Buffer, channel: Sequence[tir.PrimExpr]) -> None:
    with ib.for_range(0, tiles.shape[2], name="place") as place:
        ib.emit(tir.BufferStore(tiles, tir.const(0, "float32"), [*channel, place]))


def _each_pixel(ib: IRBuilder, rows: Sequence[range], columns: Mapping[int, range], run: int, copy: _Copy) -> None:
    """Copy the pixels (row, col) of the tiles `rows[row]` x `columns[col]`.

    Tiles that have all columns are done column by column in one loop for each run, of which LLVM makes shuffles.
    """
    complete = range(max(span.start for span in columns.values()), min(span.stop for span in columns.values()))
    runs, rest = divmod(complete.stop, run)

    def whole_tiles(row: int, ty: tir.PrimExpr, number: tir.PrimExpr | int, tiles: range) -> None:
        with ib.for_range(0, len(tiles), name="tx") as x:
            for col in columns:
                ib.emit(copy(row, col, ty, number, tiles.start + x))

    for row, down in enumerate(rows):
        with ib.for_range(0, len(down), name="ty") as i:
            ty = down.start + i
            if run >= complete.stop:
                whole_tiles(row, ty, 0, complete)
            else:
                with ib.for_range(0, runs, name="run") as number:
                    whole_tiles(row, ty, number, range(run))
                whole_tiles(row, ty, runs, range(rest))
            for col, across in columns.items():
                for tx in across:
                    if tx not in complete:
                        ib.emit(copy(row, col, ty, *divmod(tx, run)))


def _tiles_with(pixel: int, first: int, end: int, m: int) -> range:
    """Tiles t with first <= m t + pixel < end."""
    return range(-((pixel - first) // m), -((pixel - end) // m))


def _common(one: range, other: range) -> range:
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))
