"""Winograd convolutions of images whose tiles are the lanes of one vector."""

from __future__ import annotations

import numpy as np
import pytest

from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.targets import cpu_facts
from jointsparse.schedules.tiles import SINGLE
from jointsparse.schedules.winograd_plan import winograd_plan
from tests import reference
from tests.host import TARGETS
from tests.schedules.convolutions import TOLERANCE
from tests.schedules.test_tile_chunks import kernel, weights
from tests.schedules.tiled import in_tiles, run

GRIDS = [(2, 2), (2, 4), (4, 1), (1, 3), (3, 2), (4, 4)]


@pytest.mark.parametrize(
    ("target", "rows", "cols"),
    [(target, rows, cols) for target in TARGETS for rows, cols in GRIDS if rows * cols <= cpu_facts(target).lanes],
)
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("short", [0, 1])
def test_tiles_and_zeros(target: str, size: int, tile: int, rows: int, cols: int, short: int) -> None:
    """Also where the last tiles are partly beside the image, and lanes are left over."""
    height, width = rows * tile - short, cols * tile - short
    geometry = ConvGeometry(2, 2, height, width, 3, (size, size), padding=(size // 2,) * 4)
    plan = winograd_plan(geometry, tile, cpu_facts(target))
    assert plan.layout.form == SINGLE
    data = np.random.default_rng(5).standard_normal((2, 2, height, width)).astype(np.float32)
    arrays, inputs, output = kernel(geometry, tile, target)
    result = run([in_tiles(data, plan.layout), *arrays], inputs, output, target)
    image = in_tiles(np.ones((2, 3, height, width)), plan.layout)
    np.testing.assert_array_equal(result[image == 0], 0)
    want = in_tiles(reference.winograd(data, weights(geometry, tile, 0), geometry, tile), plan.layout)
    assert np.abs(result - want).max() < 50 * TOLERANCE[tile] * np.abs(want).max()
