"""Images in the layouts of tiles.py, from the words of its docstring, and TE computes on them run by themselves."""

from __future__ import annotations

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import te

from jointsparse.schedules.tiles import CHUNKS, TileLayout


def element(layout: TileLayout, place: int, row: int, col: int) -> int:
    """Where, in a channel, pixel (row, col) of the tile at a place is."""
    plane = row * len(layout.columns) + layout.columns.index(col)
    if layout.form == CHUNKS:
        vector, lane = divmod(place, layout.lanes)
        return (vector * layout.planes + plane) * layout.lanes + lane
    return plane * layout.stride + place


def in_tiles(data: NDArray, layout: TileLayout, offset: tuple[int, int] = (0, 0)) -> NDArray:
    """Pixel (row, col) of the data is pixel (row, col) + offset of the layout's image."""
    result = np.zeros(layout.shape(*data.shape[:2]), data.dtype)
    bottom = layout.grid[0] * layout.m + layout.halo
    for down in range(-1, layout.grid[0] + 1):
        for right in range(layout.grid[1]):
            for row in range(layout.m):
                for col in layout.columns:
                    at = down * layout.m + row
                    y, x = at - offset[0], right * layout.m + col - offset[1]
                    if -layout.halo <= at < bottom and 0 <= y < data.shape[2] and 0 <= x < data.shape[3]:
                        place = layout.margin + down * layout.cols + right
                        result[:, :, element(layout, place, row, col)] = data[:, :, y, x]
    return result


def run(arrays: list[NDArray], inputs: list[te.Tensor], output: te.Tensor, target: str = "llvm") -> NDArray:
    """With the result's memory full of something else before."""
    function = tvm.build(te.create_schedule(output.op), [*inputs, output], target)
    result = tvm.nd.array(np.full([int(s) for s in output.shape], 77, np.float32))
    function(*[tvm.nd.array(array) for array in arrays], result)
    return result.numpy()
