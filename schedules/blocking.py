"""How much of a layer is computed at a time, chosen from its shape and the facts of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

from .geometry import ConvGeometry
from .layouts import PhaseLayout, direct_layout, winograd_layout

_FLOAT = 4  # bytes
_SPLIT = 64  # parts of a grid, or rows of a part, up to which every split is tried


class Cpu(Protocol):
    """The part of targets.CpuFacts used here."""

    @property
    def lanes(self) -> int: ...
    @property
    def l2(self) -> int: ...
    @property
    def accumulators(self) -> int: ...


@cache
def direct_blocking(geometry: ConvGeometry, cpu: Cpu) -> PhaseLayout:
    """The fewest blocks whose packed input takes at most half of L2; at least 4 rows where rows can be split."""

    def fits(layout: PhaseLayout) -> bool:
        return geometry.in_channels * layout.channel_size * _FLOAT <= cpu.l2 // 2

    least_rows = min(4, geometry.out_height)
    rows, cols = geometry.out_height, geometry.out_width
    while rows > least_rows and not fits(direct_layout(geometry, rows, cols)):
        rows = max(least_rows, -(-rows // 2))
    while cols > 4 * cpu.lanes and not fits(direct_layout(geometry, rows, cols)):
        cols = max(4 * cpu.lanes, -(-cols // 2))
    return direct_layout(geometry, rows, cols)


def direct_panel(layout: PhaseLayout, cpu: Cpu) -> int:
    """Output pixels to accumulate at once: the fewest panels, evenly filled."""
    vectors = -(-layout.flat_positions // cpu.lanes)
    panels = -(-vectors // cpu.accumulators)
    return -(-vectors // panels) * cpu.lanes


def extra_channels(layout: PhaseLayout, panel: int) -> int:
    """Channels of zeros to pack for what the last panel of the last channel reads beyond its planes."""
    panels = -(-layout.flat_positions // panel)
    return -(-(panels * panel - layout.flat_positions) // layout.channel_size)


@dataclass(frozen=True)
class WinogradBlocking:
    """Tiles of a block.

    Attributes:
        layout: planes of the block; a position is a tile.
        width: tile t of a block is tile (t // width, t % width); `width` - `layout.cols` of each row are waste.
        panel: tiles accumulated at once, a multiple of the vector length.
        panels: panels in a block.
    """

    layout: PhaseLayout
    width: int
    panel: int
    panels: int

    @property
    def tiles(self) -> int:
        """Tiles computed per block, waste included."""
        return self.panel * self.panels


@cache
def winograd_blocking(geometry: ConvGeometry, m: int, cpu: Cpu) -> WinogradBlocking:
    """The cheapest blocking, by a rough count of cycles, whose transformed tiles stay in cache."""
    return min(_winograd_candidates(geometry, m, cpu), key=lambda b: _winograd_cycles(b, geometry, m, cpu))


def _winograd_candidates(geometry: ConvGeometry, m: int, cpu: Cpu) -> Iterator[WinogradBlocking]:
    whole = winograd_layout(geometry, m, 1, 1)
    grid_rows, grid_cols = whole.grid
    widths = {-(-grid_cols // parts) for parts in range(1, 9)}
    widths |= {cpu.lanes * i for i in range(1, 9) if cpu.lanes * i < grid_cols + cpu.lanes}
    for cols in sorted(widths):
        for rows in sorted(_heights(grid_rows)):
            layout = replace(whole, rows=rows, cols=cols)
            for width in sorted({cols, layout.plane[1]}):
                tiles = (rows - 1) * width + cols
                vectors = -(-tiles // cpu.lanes)
                panels = -(-vectors // cpu.accumulators)
                yield WinogradBlocking(layout, width, -(-vectors // panels) * cpu.lanes, panels)


def _heights(rows: int) -> set[int]:
    """Rows of a block for every even split into at most 64 parts, or into parts of at most 64 rows.

    Up to 64 x 64 rows that is every even split. A grid of millions would have thousands.
    """
    few = range(1, min(rows, _SPLIT) + 1)
    return {-(-rows // parts) for parts in few} | {-(-rows // -(-rows // height)) for height in few}


def _winograd_cycles(blocking: WinogradBlocking, geometry: ConvGeometry, m: int, cpu: Cpu) -> float:
    """Rough cycles for the layer at 80 % sparsity. The constants are measured on AVX-512; only ratios matter."""
    positions = (m + geometry.kernel[0] - 1) ** 2
    down, across = blocking.layout.blocks
    vectors = blocking.tiles // cpu.lanes
    taps = 0.2 * positions * geometry.out_channels * geometry.in_channels / geometry.groups
    per_panel = 1.5 + 0.55 * (blocking.panel // cpu.lanes)
    products = taps * blocking.panels * per_panel
    transforms = vectors * positions * (8 * geometry.in_channels + 5 * geometry.out_channels)
    if _gathers(blocking, cpu):
        transforms += vectors * positions * geometry.in_channels * cpu.lanes
    working_set = positions * (geometry.in_channels + geometry.out_channels) * blocking.tiles * _FLOAT
    spill = max(1.0, working_set / (0.6 * cpu.l2)) ** 0.5
    return down * across * (products + transforms) * spill


def _gathers(blocking: WinogradBlocking, cpu: Cpu) -> bool:
    """Whether the tiles of a vector do not lie side by side in the planes."""
    return blocking.width != blocking.layout.plane[1] and blocking.width % cpu.lanes != 0
