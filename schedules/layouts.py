"""Where the packed input of a convolution lies in memory: blocks, phase planes and positions.

A *position* is what the direct kernel vectorises over, an output pixel. One step from a position to its neighbour is
`step` input pixels, the stride. The padded input is split into *phase planes*: plane (a, b) holds the pixels whose row
is a, and column b, modulo `step`. Then what neighbouring positions read lies side by side, for every stride, padding
and dilation, and a filter tap is an offset. Positions are computed in blocks of `rows` x `cols`, small enough for the
planes of a block to stay in cache. (Winograd's layout is that of tiles.py, of whole images, kept between layers.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .geometry import ConvGeometry


@dataclass(frozen=True)
class PhaseLayout:
    """Phase planes of the blocks of one convolution.

    Attributes:
        grid: (rows, columns) of positions over the whole output.
        rows, cols: positions in a block; the last blocks may reach beyond the grid.
        step: (vertical, horizontal) input pixels from one position to the next.
        phases: planes kept, (vertical, horizontal), at most `step`.
        halo: rows and columns that a plane has beyond `rows` and `cols`.
    """

    grid: tuple[int, int]
    rows: int
    cols: int
    step: tuple[int, int]
    phases: tuple[int, int]
    halo: tuple[int, int]

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks (down, across)."""
        return -(-self.grid[0] // self.rows), -(-self.grid[1] // self.cols)

    @property
    def plane(self) -> tuple[int, int]:
        """(rows, columns) of one plane of one block."""
        return self.rows + self.halo[0], self.cols + self.halo[1]

    @property
    def channel_size(self) -> int:
        """Elements that the planes of one channel of a block hold."""
        return self.phases[0] * self.phases[1] * self.plane[0] * self.plane[1]

    @property
    def flat_positions(self) -> int:
        """Positions of a block when they are numbered along the rows of a plane, halo columns included."""
        return (self.rows - 1) * self.plane[1] + self.cols

    def tap(self, row: int, col: int) -> int:
        """Offset, within a channel, of the pixel (row, col) of the window of the block's first position."""
        phase = (row % self.step[0]) * self.phases[1] + col % self.step[1]
        return (phase * self.plane[0] + row // self.step[0]) * self.plane[1] + col // self.step[1]


def layout_for_taps(
    grid: tuple[int, int], step: tuple[int, int], taps: tuple[Iterable[int], Iterable[int]], rows: int, cols: int
) -> PhaseLayout:
    """The layout that keeps every pixel (r, c), r in taps[0] and c in taps[1], of the positions' windows."""
    down, across = (list(t) for t in taps)
    return PhaseLayout(
        grid=grid,
        rows=min(rows, grid[0]),
        cols=min(cols, grid[1]),
        step=step,
        phases=(1 + max(t % step[0] for t in down), 1 + max(t % step[1] for t in across)),
        halo=(max(t // step[0] for t in down), max(t // step[1] for t in across)),
    )


def direct_layout(geometry: ConvGeometry, rows: int, cols: int) -> PhaseLayout:
    """Planes for direct convolution: a position is an output pixel, the step is the stride."""
    taps = tuple(range(0, k * d, d) for k, d in zip(geometry.kernel, geometry.dilation, strict=True))
    return layout_for_taps((geometry.out_height, geometry.out_width), geometry.strides, (taps[0], taps[1]), rows, cols)
