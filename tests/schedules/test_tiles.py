"""The tile layout: every pixel that a filter can read has one place, and nothing else is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jointsparse.schedules.tiles import CHUNKS, FORMS, SHARED, SINGLE, SPREAD, TileLayout, tile_layout
from tests.schedules.tiled import element

SIZES = st.integers(1, 40)
MATH = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def layouts(draw: st.DrawFn, forms: tuple[str, ...] = FORMS) -> TileLayout:
    m = draw(st.sampled_from([2, 4]))
    form = draw(st.sampled_from(forms))
    if form == SINGLE:
        few = st.integers(1, 4 * m)
        return TileLayout(draw(few), draw(few), m, m, SINGLE, 16)
    halo = draw(st.integers(1, 2)) if form == SPREAD else m
    return TileLayout(draw(SIZES), draw(SIZES), m, halo, form, draw(st.sampled_from([1, 4, 8, 16])))


IN_PLANES = layouts((SHARED, SPREAD))


def tile_place(layout: TileLayout, down: int, right: int) -> int:
    return layout.margin + down * layout.cols + right


def filled(layout: TileLayout) -> np.ndarray:
    """Numbers of pixels (1 for the first) in a channel."""
    tiles = np.zeros(layout.length, np.int64)
    for down in range(layout.grid[0]):
        for right in range(layout.grid[1]):
            for row in range(layout.m):
                for col in layout.columns:
                    y, x = down * layout.m + row, right * layout.m + col
                    if y < layout.height and 0 <= x < layout.width:
                        tiles[element(layout, tile_place(layout, down, right), row, col)] = 1 + y * layout.width + x
    return tiles


@MATH
@given(IN_PLANES)
def test_every_tile_reads_its_pixels_and_zeros_around_the_image(layout: TileLayout) -> None:
    tiles = filled(layout)
    reach = layout.halo + layout.m
    image = np.zeros((layout.height + 2 * reach, layout.width + 2 * reach), np.int64)
    image[reach : reach + layout.height, reach : reach + layout.width] = 1 + np.arange(
        layout.height * layout.width
    ).reshape(layout.height, layout.width)
    for row in range(-layout.halo, layout.m + layout.halo):
        for col in range(-layout.halo, layout.m + layout.halo):
            shift = layout.locate(row, col)
            for down in range(layout.grid[0]):
                for right in range(layout.grid[1]):
                    y, x = reach + down * layout.m + row, reach + right * layout.m + col
                    assert tiles[tile_place(layout, down, right) + shift] == image[y, x]


@MATH
@given(layouts((CHUNKS,)))
def test_chunks_beside_have_the_pixels_beside(layout: TileLayout) -> None:
    """Of the vector of tiles beside, or of the first chunk, which is zero: what belongs to the neighbouring tiles."""
    size, across = layout.planes * layout.lanes, layout.cols // layout.lanes
    chunks = filled(layout).reshape(-1, size)
    assert not chunks[0].any()
    assert len(chunks) == 1 + layout.vectors
    for down in range(layout.grid[0]):
        for vector in range(across):
            own = chunks[1 + down * across + vector].reshape(layout.m, layout.m, layout.lanes)
            after = chunks[2 + down * across + vector if vector + 1 < across else 0].reshape(own.shape)
            row = np.concatenate([own, after], axis=2)
            for lane in range(layout.lanes):
                y, x = down * layout.m, (vector * layout.lanes + lane + 1) * layout.m
                number = 1 + y * layout.width + x
                assert row[0, 0, lane + 1] == (number if x < layout.width else 0)


@MATH
@given(layouts())
def test_no_two_pixels_share_a_place(layout: TileLayout) -> None:
    elements = [
        element(layout, tile_place(layout, down, right), row, col)
        for down in range(layout.grid[0])
        for right in range(layout.grid[1])
        for row in range(layout.m)
        for col in layout.columns
    ]
    assert len(set(elements)) == len(elements)
    assert min(elements) >= 0
    assert max(elements) < layout.length


@MATH
@given(IN_PLANES)
def test_every_pixel_has_one_place_in_a_plane(layout: TileLayout) -> None:
    tiles = filled(layout)[: layout.planes * layout.stride].reshape(layout.planes, layout.stride)
    pixels = np.arange(1, 1 + layout.height * layout.width)
    for row in range(layout.m):
        for col in layout.columns:
            found = tiles[layout.plane(row, col) // layout.stride]
            assert len(np.unique(found[found > 0])) == np.count_nonzero(found)
    own = [layout.plane(row, col) // layout.stride for row in range(layout.m) for col in range(layout.m)]
    np.testing.assert_array_equal(np.sort(tiles[own][tiles[own] > 0]), pixels)
    places = {layout.plane(row, col) for row in range(layout.m) for col in layout.columns}
    assert places == set(range(0, layout.planes * layout.stride, layout.stride))


@MATH
@given(layouts())
def test_sizes(layout: TileLayout) -> None:
    down, right = layout.grid
    assert (down - 1) * layout.m < layout.height <= down * layout.m
    assert (right - 1) * layout.m < layout.width <= right * layout.m
    assert layout.planes == layout.m * (layout.m + 2 * layout.halo if layout.form == SPREAD else layout.m)
    assert layout.margin % layout.lanes == 0
    assert layout.end == layout.margin + layout.vectors * layout.lanes
    # Vectors hold the last tile, and one fewer would not.
    tiles = tile_place(layout, down - 1, right - 1) + 1 - layout.margin
    assert (layout.vectors - 1) * layout.lanes < down * layout.cols <= layout.vectors * layout.lanes
    assert tiles <= down * layout.cols


@MATH
@given(IN_PLANES)
def test_sizes_of_planes(layout: TileLayout) -> None:
    assert layout.length == layout.planes * layout.stride + layout.margin
    # Whole vectors, but not a multiple of 1 KiB, which would be 256 elements.
    assert layout.stride % layout.lanes == 0
    assert layout.stride % 256
    assert layout.end <= layout.stride <= layout.end + layout.lanes


@MATH
@given(layouts((CHUNKS,)))
def test_sizes_of_chunks(layout: TileLayout) -> None:
    assert layout.cols % layout.lanes == 0
    assert layout.length == (1 + layout.vectors) * layout.planes * layout.lanes


@MATH
@given(IN_PLANES)
def test_vectors_never_read_beyond_a_channel(layout: TileLayout) -> None:
    """Not even the lanes that are no tile's."""
    reads = [
        layout.locate(row, col)
        for row in range(-layout.halo, layout.m + layout.halo)
        for col in range(-layout.halo, layout.m + layout.halo)
    ]
    assert layout.margin + min(reads) >= 0
    assert layout.end + max(reads) <= layout.length


@MATH
@given(IN_PLANES)
def test_between_planes_there_is_room_for_what_both_have_there(layout: TileLayout) -> None:
    """Zeros before the first row of tiles and behind the last; where it is spread, perhaps pixels."""
    before = layout.margin + layout.locate(-1, layout.columns[0]) - layout.locate(layout.m - 1, layout.columns[0])
    assert before == layout.margin - layout.cols >= 1
    behind = layout.margin + (layout.grid[0] + 1) * layout.cols
    assert layout.form == SHARED or behind <= layout.stride + before


@MATH
@given(SIZES, SIZES, st.sampled_from([2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 4, 8, 16]))
def test_the_form_with_the_fewest_vectors_or_nearly(height: int, width: int, m: int, halo: int, lanes: int) -> None:
    layout = tile_layout(height, width, m, halo, lanes)
    shared, spread, chunks = (
        TileLayout(height, width, m, halo if form == SPREAD else m, form, lanes) for form in (SHARED, SPREAD, CHUNKS)
    )
    least = min(shared.vectors, spread.vectors)
    if 1 < shared.grid[0] * shared.grid[1] <= lanes:
        assert layout == replace(shared, form=SINGLE)
        return
    in_planes = spread if 4 * spread.vectors <= 3 * shared.vectors else shared
    assert layout == (chunks if chunks.vectors <= 1.15 * least else in_planes)


def test_examples() -> None:
    assert tile_layout(224, 224, 4, 1, 16).form == CHUNKS
    assert tile_layout(28, 28, 4, 1, 16).form == SHARED
    assert tile_layout(14, 14, 4, 1, 16).form == SINGLE
    assert tile_layout(14, 14, 4, 1, 8).form == SPREAD
    # Filters of both sizes read these layouts: no conversion between them.
    assert tile_layout(56, 56, 2, 1, 8) == tile_layout(56, 56, 2, 2, 8)
    assert tile_layout(28, 28, 4, 1, 16) == tile_layout(28, 28, 4, 2, 16)
    assert tile_layout(14, 14, 4, 1, 16) == tile_layout(14, 14, 4, 2, 16)
    # Nothing but pixels: 14 x 14 of 16 x 16.
    assert tile_layout(14, 14, 4, 1, 16).length == 16 * 16
    narrow = tile_layout(14, 14, 4, 1, 8)
    assert replace(narrow, form=SHARED, halo=4).vectors == 3
    assert narrow.vectors == 2


@MATH
@given(layouts((SINGLE,)))
def test_a_single_vector_is_nothing_but_tiles(layout: TileLayout) -> None:
    assert layout.vectors == 1
    assert layout.length == layout.planes * layout.lanes
    pixels = filled(layout)
    np.testing.assert_array_equal(np.sort(pixels[pixels > 0]), np.arange(1, 1 + layout.height * layout.width))
