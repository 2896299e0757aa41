"""Images in tiles, the layout that Winograd convolutions read and write.

A channel of an image is cut into tiles of m x m pixels, and pixel (row, col) of all tiles forms a plane: there
neighbouring tiles lie side by side, so that tiles are vector lanes and the transforms of a vector read and write
vectors. Pixels of the last tiles beyond the image are zero, and so is everything around it, as far as a filter can
reach.

There are four forms of it, by how a filter reaches over the edge of a tile:

- *shared*: planes one behind the other; rows of tiles follow each other in a plane with one place of zeros between two
  rows, shared by both. A vector may begin at any tile.
- *spread*: the same without that place; the columns left and right of a tile have planes of their own. For images so
  small that the places between would waste too many lanes.
- *chunks*: rows are filled up to whole vectors, and vectors follow each other, each with its pixels of all planes: a
  *chunk*. What a vector reads is in few places in memory and what it writes in one, which matters for images that are
  not in the caches. What lies left or right of it has to be put together of two vectors, and where there is no chunk
  beside it, one of zeros takes its place, the first.
- *single*: all tiles are lanes of one vector, and nothing else is stored: what lies beside a tile is moved from another
  lane.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from .geometry import round_up

SHARED, SPREAD, CHUNKS, SINGLE = FORMS = ("shared", "spread", "chunks", "single")


@dataclass(frozen=True)
class TileLayout:
    """An image of a tensor (batch, channels, length).

    Attributes:
        height, width: of the image, in pixels.
        m: pixels of a tile, down and across.
        halo: pixels beyond a tile, to each side, that can be read; at most m.
        form: one of FORMS.
        lanes: places come in multiples of it.
    """

    height: int
    width: int
    m: int
    halo: int
    form: str
    lanes: int

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles (down, across)."""
        return -(-self.height // self.m), -(-self.width // self.m)

    @property
    def cols(self) -> int:
        """Places from a row of tiles to the next."""
        across = self.grid[1]
        filled = {SHARED: across + 1, SPREAD: across, CHUNKS: round_up(across, self.lanes), SINGLE: across}
        return filled[self.form]

    @property
    def columns(self) -> range:
        """Columns of pixels, counted from a tile's first, that have planes."""
        return range(-self.halo, self.m + self.halo) if self.form == SPREAD else range(self.m)

    @property
    def planes(self) -> int:
        return self.m * len(self.columns)

    @property
    def margin(self) -> int:
        """Places before the first tile. In planes: of each, and behind the last one. Those behind a plane are the next
        one's: zeros for both; but where it is spread, pixels beside the image may be kept there (see to_tiles)."""
        if self.form == CHUNKS:
            return self.lanes
        if self.form == SINGLE:
            return 0
        return round_up((2 if self.form == SPREAD else 1) * (self.cols + 1), self.lanes)

    @property
    def vectors(self) -> int:
        """Vectors that hold all tiles."""
        return -(-self.grid[0] * self.cols // self.lanes)

    @property
    def end(self) -> int:
        """Place behind the last vector of tiles."""
        return self.margin + self.vectors * self.lanes

    @property
    def stride(self) -> int:
        """Elements from a plane to the next. Long planes are not a multiple of 1 KiB apart: they would fight for the
        same few ways of L1."""
        if self.form == CHUNKS:
            return self.lanes
        return self.end + (self.lanes if self.end % 256 == 0 else 0)

    @property
    def step(self) -> int:
        """Elements from a vector to the next, for each of its places."""
        return self.planes if self.form == CHUNKS else 1

    @property
    def length(self) -> int:
        """Elements of a channel."""
        return self.end * self.step if self.form == CHUNKS else self.planes * self.stride + self.margin

    @property
    def run(self) -> int:
        """Tiles of a row that lie side by side in a plane."""
        return self.lanes if self.form == CHUNKS else self.grid[1]

    def shape(self, batch: int, channels: int) -> tuple[int, int, int]:
        """Of a tensor."""
        return batch, channels, self.length

    def plane(self, row: int, col: int) -> int:
        """Where the plane of pixel (row, col) of a tile begins, col in `columns`."""
        return (row * len(self.columns) + col - self.columns[0]) * self.stride

    def locate(self, row: int, col: int) -> int:
        """Where the pixel (row, col) of a tile is, each in [-halo, m + halo), counted from the tile's place; not in
        chunks, nor in a single vector."""
        down = row // self.m * self.cols
        if self.form == SPREAD:
            return self.plane(row % self.m, col) + down
        return self.plane(row % self.m, col % self.m) + down + col // self.m


_MORE_VECTORS = 1.15
"""With so many times the vectors, chunks are still faster. Measured on x86 for images of 56 to 256 pixels."""

_MORE_PLANES = 0.75
"""With so many times the vectors, planes for the columns beside are worth it."""


@cache
def tile_layout(height: int, width: int, m: int, halo: int, lanes: int) -> TileLayout:
    """The layout for images of this size: that with the fewest vectors, or nearly."""
    shared = TileLayout(height, width, m, m, SHARED, lanes)
    if 1 < math.prod(shared.grid) <= lanes:
        return replace(shared, form=SINGLE)
    spread, chunks = replace(shared, halo=halo, form=SPREAD), replace(shared, form=CHUNKS)
    if chunks.vectors <= _MORE_VECTORS * min(shared.vectors, spread.vectors):
        return chunks
    return spread if spread.vectors <= _MORE_PLANES * shared.vectors else shared
