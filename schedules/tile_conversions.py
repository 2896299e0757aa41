"""Images into the tile layout of tiles.py and back."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import te, tir

from .tiles import TileLayout


def to_tiles(data: te.Tensor, layout: TileLayout, offset: tuple[int, int] = (0, 0)) -> te.Tensor:
    """Lay images out in tiles.

    Args:
        data: (N, C, H, W) float32.
        offset: (down, right) from a pixel of the data to the same pixel of the layout's image. What then lies beside
            the image is kept as far as a filter reaches, zeros elsewhere; that needs a spread layout.

    Returns:
        (N, C, planes, size).
    """
    batch, channels, height, width = (int(s) for s in data.shape)

    def fill(source: tir.Buffer, target: tir.Buffer) -> tir.Stmt:
        ib = tvm.tir.ir_builder.create()
        with ib.for_range(0, batch * channels, name="image", kind="parallel") as image:
            n, c = image // channels, tir.floormod(image, channels)
            _clear(ib, lambda plane, place: tir.BufferStore(target, _ZERO, [n, c, plane, place]), layout)
            for a in range(layout.m):
                rows = _tiles_over(a, -layout.halo, layout.grid[0] * layout.m + layout.halo, layout.m)
                rows = _common(rows, _tiles_over(a - offset[0], 0, height, layout.m))
                with ib.for_range(0, len(rows), name="ty") as i:
                    row, start = (rows.start + i) * layout.m + a - offset[0], _row_start(layout, rows.start + i)
                    spans = {
                        b: _common(range(layout.grid[1]), _tiles_over(b - offset[1], 0, width, layout.m))
                        for b in layout.columns
                    }

                    def copy(tx: tir.PrimExpr, b: int, row: tir.PrimExpr = row, start: tir.PrimExpr = start) -> None:
                        pixel = source[n, c, row, tx * layout.m + (b - offset[1])]
                        ib.emit(tir.BufferStore(target, pixel, [n, c, layout.plane(a, b), start + tx]))

                    _across(ib, spans, copy)
        return ib.get()

    return te.extern(
        [layout.shape(batch, channels)], [data], lambda ins, outs: fill(ins[0], outs[0]), name="tiles", dtype="float32"
    )


def from_tiles(tiles: te.Tensor, layout: TileLayout) -> te.Tensor:
    """The images (N, C, height, width) of a tensor in tile layout."""
    batch, channels = (int(s) for s in tiles.shape[:2])

    def fill(source: tir.Buffer, target: tir.Buffer) -> tir.Stmt:
        ib = tvm.tir.ir_builder.create()
        with ib.for_range(0, batch * channels, name="image", kind="parallel") as image:
            n, c = image // channels, tir.floormod(image, channels)
            for a in range(layout.m):
                rows = _tiles_over(a, 0, layout.height, layout.m)
                with ib.for_range(0, len(rows), name="ty") as ty:
                    spans = {b: _tiles_over(b, 0, layout.width, layout.m) for b in range(layout.m)}

                    def copy(tx: tir.PrimExpr, b: int, ty: tir.PrimExpr = ty, a: int = a) -> None:
                        pixel = source[n, c, layout.plane(a, b), _row_start(layout, ty) + tx]
                        ib.emit(tir.BufferStore(target, pixel, [n, c, ty * layout.m + a, tx * layout.m + b]))

                    _across(ib, spans, copy)
        return ib.get()

    return te.extern(
        [(batch, channels, layout.height, layout.width)],
        [tiles],
        lambda ins, outs: fill(ins[0], outs[0]),
        name="image",
        dtype="float32",
    )


_ZERO = tir.const(0, "float32")


def _clear(ib: tvm.tir.ir_builder.IRBuilder, zero: Callable[..., tir.Stmt], layout: TileLayout) -> None:
    with ib.for_range(0, layout.planes, name="plane") as plane:
        with ib.for_range(0, layout.size, name="place") as place:
            ib.emit(zero(plane, place))


def _row_start(layout: TileLayout, ty: tir.PrimExpr) -> tir.PrimExpr:
    return layout.margin + ty * layout.cols


def _across(
    ib: tvm.tir.ir_builder.IRBuilder, spans: dict[int, range], copy: Callable[[tir.PrimExpr, int], None]
) -> None:
    """Copy tiles `spans[b]` of every column b: those of all columns together, which LLVM makes shuffles of."""
    shared = range(max(span.start for span in spans.values()), min(span.stop for span in spans.values()))
    if shared:
        with ib.for_range(0, len(shared), name="tx") as i:
            for b in spans:
                copy(shared.start + i, b)
    for b, span in spans.items():
        for tx in span:
            if tx not in shared:
                copy(tir.const(tx, "int32"), b)


def _tiles_over(pixel: int, first: int, end: int, m: int) -> range:
    """Tiles t with first <= m t + pixel < end."""
    return range(-((pixel - first) // m), -((pixel - end) // m))


def _common(one: range, other: range) -> range:
    start, stop = max(one.start, other.start), min(one.stop, other.stop)
    return range(start, max(start, stop))
