"""Into tile layout and back, compiled, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tvm import te

from jointsparse.schedules import operators  # noqa: F401  (readies LLVM)
from jointsparse.schedules.targets import cpu_facts
from jointsparse.schedules.tile_conversions import from_tiles, to_tiles
from jointsparse.schedules.tiles import CHUNKS, FORMS, SHARED, SINGLE, SPREAD, TileLayout, tile_layout
from tests.host import TARGETS
from tests.schedules.tiled import in_tiles, run

LAYOUTS = {
    SHARED: lambda m, halo, lanes: TileLayout(9, 13, m, m, SHARED, lanes),
    SPREAD: lambda m, halo, lanes: TileLayout(9, 13, m, halo, SPREAD, lanes),
    CHUNKS: lambda m, halo, lanes: TileLayout(9, 13, m, m, CHUNKS, lanes),
    SINGLE: lambda m, halo, lanes: TileLayout(9, 13, m, m, SINGLE, 64),
}


def convert(data: NDArray, layout: TileLayout, offset: tuple[int, int] = (0, 0)) -> NDArray:
    source = te.placeholder(data.shape, name="data")
    return run([data], [source], to_tiles(source, layout, offset))


def images(*shape: int) -> NDArray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("halo", [1, 2])
def test_into_tiles_and_back(kind: str, lanes: int, m: int, halo: int) -> None:
    layout, data = LAYOUTS[kind](m, halo, lanes), images(2, 3, 9, 13)
    tiles = convert(data, layout)
    np.testing.assert_array_equal(tiles, in_tiles(data, layout))
    source = te.placeholder(tiles.shape, name="tiles")
    np.testing.assert_array_equal(run([tiles], [source], from_tiles(source, layout)), data)


@pytest.mark.parametrize("height", [1, 4, 7])
@pytest.mark.parametrize("width", [2, 4, 16, 17, 34])
@pytest.mark.parametrize("form", FORMS)
def test_sizes(height: int, width: int, form: str) -> None:
    lanes = 32 if form == SINGLE else 4
    layout, data = TileLayout(height, width, 4, 1 if form == SPREAD else 4, form, lanes), images(1, 2, height, width)
    tiles = convert(data, layout)
    np.testing.assert_array_equal(tiles, in_tiles(data, layout))
    source = te.placeholder(tiles.shape, name="tiles")
    np.testing.assert_array_equal(run([tiles], [source], from_tiles(source, layout)), data)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (14, 14), (28, 28), (56, 56), (5, 113), (3, 150)])
@pytest.mark.parametrize("m", [2, 4])
def test_layouts_of_a_target(target: str, size: tuple[int, int], m: int) -> None:
    """Whatever a pixel is, it is in its place only, and what is around the image does not matter for the way back."""
    layout, data = tile_layout(*size, m, 1, cpu_facts(target).lanes), images(2, 2, *size)
    data[:, :, size[0] // 2, size[1] // 2], data[:, :, -1, -1] = np.inf, np.nan
    source = te.placeholder(data.shape, name="data")
    tiles = run([data], [source], to_tiles(source, layout), target)
    np.testing.assert_array_equal(tiles, in_tiles(data, layout))
    around = in_tiles(np.ones_like(data), layout) == 0
    source = te.placeholder(tiles.shape, name="tiles")
    back = run([np.where(around, np.float32(np.nan), tiles)], [source], from_tiles(source, layout), target)
    np.testing.assert_array_equal(back, data)


@pytest.mark.parametrize("offset", [(0, 0), (-1, -1), (1, 1), (-2, 3), (3, -2), (-1, 0), (0, 12), (15, 2), (-13, 0)])
@pytest.mark.parametrize(("m", "halo"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("lanes", [4, 16])
def test_offsets(offset: tuple[int, int], m: int, halo: int, lanes: int) -> None:
    """Beside the layout's image there may be pixels of the data, as far as a filter reaches."""
    data = images(2, 2, 11, 10)
    layout = TileLayout(9, 13, m, halo, SPREAD, lanes)
    np.testing.assert_array_equal(convert(data, layout, offset), in_tiles(data, layout, offset))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_around_the_image_nothing_is_read_back(kind: str) -> None:
    """Only pixels of the image come out of tiles, whatever lies around."""
    layout = LAYOUTS[kind](4, 1, 8)
    tiles = np.where(in_tiles(np.ones((1, 1, 9, 13), np.float32), layout) > 0, 2, np.nan).astype(np.float32)
    source = te.placeholder(tiles.shape, name="tiles")
    np.testing.assert_array_equal(run([tiles], [source], from_tiles(source, layout)), np.full((1, 1, 9, 13), 2))
