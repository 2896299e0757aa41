"""The tile layout: an image kept between layers as the planes that Winograd's transforms read and write.

Pixel (row, col) = (m ty + a, m tx + b) lies in *plane* (a, b) at a *place* that depends on the tile (ty, tx) alone.
Neighbouring tiles lie side by side, so that tiles are vector lanes, a vector may begin at any tile, and all that the
transforms of a vector read and write is contiguous. Pixels of the last tiles beyond the image are zero, and so is
everything around it, as far as a filter can reach.

Rows of tiles follow each other in a plane. For filters that reach over the left or right edge there is either one
place of zeros between two rows, shared by both; or, where that would waste too many lanes, the columns left and right
of a tile have planes of their own (*spread*).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from .geometry import round_up


@dataclass(frozen=True)
class TileLayout:
    """An image of a tensor (batch, channels, length): planes, one behind the other.

    Attributes:
        height, width: of the image, in pixels.
        m: pixels of a tile, down and across.
        halo: pixels beyond a tile, to each side, that can be read; at most m.
        spread: whether columns beyond a tile have planes of their own.
        lanes: places come in multiples of it.
    """

    height: int
    width: int
    m: int
    halo: int
    spread: bool
    lanes: int

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles (down, across)."""
        return -(-self.height // self.m), -(-self.width // self.m)

    @property
    def cols(self) -> int:
        """Places from a row of tiles to the next."""
        return self.grid[1] + (0 if self.spread else 1)

    @property
    def columns(self) -> range:
        """Columns of pixels, counted from a tile's first, that have planes."""
        return range(-self.halo, self.m + self.halo) if self.spread else range(self.m)

    @property
    def planes(self) -> int:
        return self.m * len(self.columns)

    @property
    def margin(self) -> int:
        """Places before the first tile of every plane, and behind the last plane. Those behind a plane are the next
        one's: zeros for both; but where it is spread, pixels beside the image may be kept there (see to_tiles)."""
        return round_up((2 if self.spread else 1) * (self.cols + 1), self.lanes)

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
        """Places from a plane to the next; not a multiple of 1 KiB: planes would fight for the same few ways of L1."""
        return self.end + (self.lanes if self.end % 256 == 0 else 0)

    @property
    def length(self) -> int:
        """Elements of a channel."""
        return self.planes * self.stride + self.margin

    def shape(self, batch: int, channels: int) -> tuple[int, int, int]:
        """Of a tensor."""
        return batch, channels, self.length

    def plane(self, row: int, col: int) -> int:
        """Where the plane of pixel (row, col) of a tile begins, col in `columns`."""
        return (row * len(self.columns) + col - self.columns[0]) * self.stride

    def locate(self, row: int, col: int) -> int:
        """Where the pixel (row, col) of a tile is, each in [-halo, m + halo), counted from the tile's place."""
        down = row // self.m * self.cols
        if self.spread:
            return self.plane(row % self.m, col) + down
        return self.plane(row % self.m, col % self.m) + down + col // self.m


@cache
def tile_layout(height: int, width: int, m: int, halo: int, lanes: int) -> TileLayout:
    """The layout with the fewest vectors; spread, which takes more planes, where it saves a quarter of them."""
    shared = TileLayout(height, width, m, m, False, lanes)
    spread = replace(shared, halo=halo, spread=True)
    return spread if spread.vectors <= 0.75 * shared.vectors else shared
