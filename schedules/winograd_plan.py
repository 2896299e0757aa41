"""How a sparse Winograd convolution is computed: the layout of input and result, and blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .blocking import PARALLEL_BLOCKS, Cpu, WinogradBlocking, winograd_blocking
from .geometry import ConvGeometry
from .tiles import SPREAD, TileLayout, tile_layout

_SKEW = 16
"""Positions of a tile are a line (16 floats) more than their contents apart: at powers of two apart, all n x n of them
would fight for the same few ways of L1."""


@dataclass(frozen=True)
class WinogradPlan:
    """All that the kernel is made from, weights apart.

    Attributes:
        geometry: stride and dilation 1, square filters.
        layout: of input and result: the same tiles at the same places.
        offset: (down, right) from a pixel of the input to the same pixel of the layout's image.
        idle: positions of a tile at which no filter has a weight: nothing is computed there. Ascending, never all.
    """

    geometry: ConvGeometry
    layout: TileLayout
    offset: tuple[int, int]
    blocking: WinogradBlocking
    idle: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        geometry: ConvGeometry,
        tile: int,
        lanes: int,
        blocks: int,
        together: int,
        idle: tuple[int, ...] = (),
    ) -> WinogradPlan:
        """From what an operator's attributes hold: tile size, lanes of a vector, blocks of an image, rows together,
        idle positions."""
        layout, offset = _layout(geometry, tile, lanes)
        blocking = WinogradBlocking(layout.vectors, blocks, together)
        return cls(geometry, layout, offset, blocking, idle)

    @property
    def blocks_in_parallel(self) -> bool:
        """Whether each block is computed from beginning to end by one thread; otherwise all share out one block after
        the other."""
        return self.all_blocks >= PARALLEL_BLOCKS

    @property
    def positions(self) -> int:
        """Of a tile in the Winograd domain, n x n."""
        return (self.layout.m + self.geometry.kernel[0] - 1) ** 2

    @property
    def busy(self) -> tuple[int, ...]:
        """Positions that are not idle."""
        return tuple(position for position in range(self.positions) if position not in self.idle)

    @property
    def tiles(self) -> int:
        """Of a block; some may have fewer."""
        return self.blocking.vectors * self.layout.lanes

    @property
    def bundles(self) -> int:
        """Of rows computed together, at each position."""
        return -(-self.geometry.out_channels // self.blocking.together)

    @property
    def all_blocks(self) -> int:
        """Of all images."""
        return self.geometry.batch * self.blocking.blocks

    @property
    def parts(self) -> int:
        """Of a block, each done by one thread: of its channels, which are transformed, then of its positions, at which
        is multiplied, then of its filters, which are transformed back."""
        return 1 if self.blocks_in_parallel else PARALLEL_BLOCKS

    @property
    def inputs_size(self) -> int:
        """Floats of the transformed input of a block."""
        return self.positions * self.input_stride

    @property
    def index_unit(self) -> int:
        """Floats that the index of a non-zero counts: two, times eight bytes an address can be made without a shift."""
        return 2 if self.tiles % 2 == 0 else 1

    @property
    def index_step(self) -> int:
        """Index of a channel, less that of the channel before."""
        return self.tiles // self.index_unit

    @property
    def input_stride(self) -> int:
        """Floats of a position of the transformed input: all channels, and one of zeros for what fills rows up."""
        return (self.geometry.in_channels + 1) * self.tiles + _SKEW

    @property
    def product_stride(self) -> int:
        """Floats of a position of the products: all filters, and one that takes what fills a bundle up."""
        return (self.geometry.out_channels + 1) * self.tiles + _SKEW

    @property
    def products_size(self) -> int:
        """Floats of the products of a block."""
        return self.positions * self.product_stride


@cache
def winograd_plan(geometry: ConvGeometry, tile: int, cpu: Cpu) -> WinogradPlan:
    """The plan for a CPU."""
    layout, _ = _layout(geometry, tile, cpu.lanes)
    blocking = winograd_blocking(layout.vectors, geometry.in_channels, geometry.out_channels, cpu)
    return WinogradPlan.of(geometry, tile, cpu.lanes, blocking.blocks, blocking.together)


def _layout(geometry: ConvGeometry, tile: int, lanes: int) -> tuple[TileLayout, tuple[int, int]]:
    """Layout of input and result, and where in it the input lies.

    With the padding that keeps the size of an image, the input is in the layout of any image of its size. With other
    paddings tiles begin elsewhere, and there may be pixels where the layout has its zeros.
    """
    reach = (geometry.kernel[0] - 1) // 2
    height, width = geometry.out_height, geometry.out_width
    offset = (geometry.padding[0] - reach, geometry.padding[1] - reach)
    if offset == (0, 0) and (height, width) == (geometry.in_height, geometry.in_width):
        return tile_layout(height, width, tile, reach, lanes), offset
    return TileLayout(height, width, tile, reach, SPREAD, lanes), offset
