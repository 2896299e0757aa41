"""Images into the tile layout of tiles.py and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import tvm
from tvm import te, tir
from tvm.tir.ir_builder import IRBuilder

from .row_code import each_run
from .row_windows import RowWindows, longest
from .tiles import CHUNKS, SPREAD, TileLayout
from .vector_code import VectorCode


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
    whole, halo = layout.grid[0] * layout.m, layout.halo
    # Rows of the layout's image: of all tiles, and beyond these as far as there is data.
    rows = range(min(0, max(down, -halo)), max(whole, min(down + height, whole + halo)))
    inside = [0 <= row - down < height for row in rows]
    columns = layout.columns
    # Places without a tile, between two rows: written as well, unless all places are cleared before.
    across = layout.cols if _has_whole_vectors(layout) else layout.grid[1]
    tiles_of_row = RowWindows(
        width, columns.start - right, layout.m, len(columns), across, fill=0.0, lanes=layout.lanes
    )

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        (image,), (tiles,) = ins, outs
        ib = tvm.tir.ir_builder.create()

        def emit_row(channel: Sequence[tir.PrimExpr], row: tir.PrimExpr, is_inside: bool) -> None:
            def load(code: VectorCode, x: tir.PrimExpr) -> tir.PrimExpr:
                return code.load(image, *channel, row - down, x)

            def store(code: VectorCode, tx: tir.PrimExpr, pixels: Sequence[tir.PrimExpr]) -> None:
                for col, value in zip(columns, pixels, strict=True):
                    code.store(tiles, value, *channel, _element(layout, row, col, tx))

            tiles_of_row.emit(ib, load if is_inside else None, store)

        with ib.for_range(0, batch * channels, name="channel", kind="parallel") as i:
            channel = [i // channels, tir.floormod(i, channels)]
            _clear_around(VectorCode(ib, layout.lanes), layout, tiles, channel)
            with ib.for_range(0, len(rows), name="row") as r:
                each_run(ib, r, inside, partial(emit_row, channel, rows.start + r))
        return ib.get()

    return te.extern([layout.shape(batch, channels)], [data], emit, name="tiles", dtype="float32")


def from_tiles(tiles: te.Tensor, layout: TileLayout) -> te.Tensor:
    """The images (N, C, height, width) of a tensor in tile layout."""
    batch, channels = (int(s) for s in tiles.shape[:2])

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        ib = tvm.tir.ir_builder.create()
        with ib.for_range(0, batch * channels, name="channel", kind="parallel") as i:
            channel = [i // channels, tir.floormod(i, channels)]
            with ib.for_range(0, layout.height, name="row") as row:
                _pixels_of_row(ib, layout, ins[0], outs[0], channel, row)
        return ib.get()

    shape = (batch, channels, layout.height, layout.width)
    return te.extern([shape], [tiles], emit, name="image", dtype="float32")


def _pixels_of_row(
    ib: IRBuilder,
    layout: TileLayout,
    tiles: tir.Buffer,
    image: tir.Buffer,
    channel: Sequence[tir.PrimExpr],
    row: tir.PrimExpr,
) -> None:
    """Whole vectors of tiles, then whole vectors of pixels up to the row's end; some pixels may be written twice."""
    by_tiles = VectorCode(ib, longest(layout.lanes, layout.cols))
    by_pixels = VectorCode(ib, longest(layout.lanes, layout.width) if by_tiles.lanes > 1 else 1)

    def load(col: int, tile: tir.PrimExpr | int) -> tir.PrimExpr:
        return by_tiles.load(tiles, *channel, _element(layout, row, col, tile))

    vectors, pixels = layout.width // (layout.m * by_tiles.lanes), layout.m * by_tiles.lanes
    with by_tiles.loop(vectors, "v") as v:
        columns = [by_tiles.keep(load(col, v * by_tiles.lanes)) for col in range(layout.m)]
        by_tiles.join_columns(columns, image, *channel, row, v * pixels)
    behind = range(layout.width - by_pixels.lanes, vectors * pixels - by_pixels.lanes, -by_pixels.lanes)
    for first in [max(start, 0) for start in reversed(behind)]:
        found = [_found(layout, by_tiles.lanes, first + i) for i in range(by_pixels.lanes)]
        used = list(dict.fromkeys((col, tile) for col, tile, _ in found))
        order = [used.index((col, tile)) * by_tiles.lanes + lane for col, tile, lane in found]
        value = load(*used[0]) if by_tiles.lanes == 1 else tir.Shuffle([load(*key) for key in used], order)
        by_pixels.store(image, value, *channel, row, first)


def _found(layout: TileLayout, lanes: int, pixel: int) -> tuple[int, int, int]:
    """Of a pixel of a row: its column in its tile, the first tile of the vector that holds it, its lane there."""
    tile, col = divmod(pixel, layout.m)
    first = min(tile // lanes * lanes, layout.cols - lanes)
    return col, first, tile - first


def _element(layout: TileLayout, row: tir.PrimExpr, col: int, tile: tir.PrimExpr | int) -> tir.PrimExpr:
    """Where pixel (row, col) is, the row counted from the image's, the column from the tile's first; a vector of tiles
    lies in one chunk."""
    m, run = layout.m, layout.run if layout.form == CHUNKS else layout.cols
    down, within = (row + m) // m - 1, tir.floormod(row + m, m)  # the row may be one beyond the image
    first = layout.margin + down * layout.cols + tile // run * run
    plane = (within * len(layout.columns) + (col - layout.columns[0])) * layout.stride
    return first * layout.step + plane + tile % run


def _has_whole_vectors(layout: TileLayout) -> bool:
    """Whether the rows of tiles fill one vector at least: whole ones need no clearing, the rest _clear_around does."""
    return layout.grid[0] * layout.cols >= layout.lanes


def _clear_around(code: VectorCode, layout: TileLayout, tiles: tir.Buffer, channel: Sequence[tir.PrimExpr]) -> None:
    """Zeros before and behind the whole vectors of tiles."""

    def clear(start: tir.PrimExpr | int, count: int) -> None:
        with code.loop(count // layout.lanes, "v") as v:
            code.store(tiles, code.splat(0.0), *channel, start + v * layout.lanes)

    clear(0, layout.margin * layout.step)
    if layout.form != CHUNKS:
        end = layout.margin + layout.grid[0] * layout.cols // layout.lanes * layout.lanes
        with code.loop(layout.planes, "plane") as plane:
            # Up to the first tile of the next plane.
            clear(plane * layout.stride + end, layout.stride - end + layout.margin)
