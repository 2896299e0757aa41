"""How a chain of Winograd convolutions is computed strip by strip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from .geometry import ConvGeometry
from .winograd_plan import WinogradPlan

_FLOAT = 4  # bytes

_WORKING_SET = 7 << 18
"""Bytes that a strip may work on at a time: 1.75 MiB, for the L2 of a server's core. Where it is smaller they lie in
the cache behind, which is better still than whole images in memory."""

ROWS = 3
"""Rows of tiles of an image that are kept: those that the next convolution reads for one of its own."""

_UNITS = 8
"""So many strips, or parts of them, at least, for threads to share evenly."""

_PART = 4
"""Rows of tiles of a part, at least, for each layer: of all layers but the last it computes rows beyond it as well, one
for each layer on average."""


@dataclass(frozen=True)
class StripPlan:
    """A chain of convolutions of stride 1 that keep the size of the image, with tiles of one size.

    Images between them are never there as a whole: a strip of the image is computed row of tiles by row of tiles, each
    convolution one row behind the one before, and of each image three rows are kept. A strip is wider than what it
    gives on either side: what lies beyond is not known to it, and every convolution carries that some pixels further
    in.

    Attributes:
        layers: how each convolution multiplies; of their layouts only tiles and lanes matter.
        vectors: of tiles across a strip.
        parts: into which strips are cut, from top to bottom.
    """

    layers: tuple[WinogradPlan, ...]
    vectors: int
    parts: int

    @property
    def geometry(self) -> ConvGeometry:
        """Of the first convolution."""
        return self.layers[0].geometry

    @property
    def m(self) -> int:
        return self.layers[0].layout.m

    @property
    def lanes(self) -> int:
        return self.layers[0].layout.lanes

    @property
    def channels(self) -> tuple[int, ...]:
        """Of all images, from the first to the last."""
        return (self.geometry.in_channels, *(layer.geometry.out_channels for layer in self.layers))

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of the image (down, across)."""
        return self.layers[0].layout.grid

    @property
    def width(self) -> int:
        """Tiles of a strip."""
        return self.vectors * self.lanes

    @property
    def halo(self) -> int:
        """Tiles of a strip, on either side, that it does not give; none where it is as wide as the image."""
        return 0 if self.width >= self.grid[1] else -(-self.spoiled // self.m)

    @property
    def spoiled(self) -> int:
        """Columns of pixels at an edge of a strip that have met something from beyond it, even if only in sums where it
        cancels out: an infinity would not.

        What is first of a tile's inputs is met by its first pixel alone, by the points of Winograd's matrices, the
        second by all of them.
        """
        columns = 0
        for layer in self.layers:
            reach = (layer.geometry.kernel[0] - 1) // 2
            tile = -(-(columns + reach) // self.m) - 1  # the last that reads any
            met = columns + reach - tile * self.m
            columns = tile * self.m + (1 if met == 1 else self.m)
        return columns

    @property
    def strips(self) -> int:
        return -(-self.grid[1] // (self.width - 2 * self.halo))

    @property
    def rows(self) -> int:
        """Rows of tiles that a part gives."""
        return -(-self.grid[0] // self.parts)

    @property
    def units(self) -> int:
        """Parts of all strips of all images, each computed by one thread."""
        return self.geometry.batch * self.strips * self.parts

    @property
    def row_stride(self) -> int:
        """Places from a row that is kept to the next; zeros between them where tiles fill the whole width."""
        return self.width + (self.lanes if self.width == self.grid[1] else 0)

    @property
    def plane(self) -> int:
        """Places of a plane: an odd number of vectors, since at powers of two apart they would fight for the same few
        ways of L1."""
        vectors = ROWS * self.row_stride // self.lanes
        return (vectors + 1 - vectors % 2) * self.lanes

    def kept(self, image: int) -> int:
        """Elements kept of an image, with a vector before the first and one behind the last, for reads beside them."""
        return self.lanes + self.channels[image] * self.m**2 * self.plane + self.lanes

    @property
    def inputs(self) -> int:
        """Elements of the transformed input of a block of any layer."""
        return max(layer.positions * layer.input_stride for layer in self.layers)

    @property
    def products(self) -> int:
        return max(layer.positions * layer.product_stride for layer in self.layers)

    @property
    def working_set(self) -> int:
        """Bytes."""
        return _FLOAT * (sum(map(self.kept, range(len(self.layers)))) + self.inputs + self.products)

    @property
    def waste(self) -> float:
        """Tiles computed for each that is needed: strips overlap, and the rows of parts, one for each layer but one."""
        rows = self.grid[0] + (self.parts - 1) * (len(self.layers) - 1)
        return self.strips * self.width / self.grid[1] * rows / self.grid[0]


@cache
def strip_plan(layers: tuple[WinogradPlan, ...]) -> StripPlan | None:
    """The plan with the least waste; None if the convolutions cannot be chained, or their rows do not fit."""
    if not _can_follow(layers):
        return None
    best: StripPlan | None = None
    for vectors in range(1, -(-layers[0].layout.grid[1] // layers[0].layout.lanes) + 1):
        plan = StripPlan(layers, vectors, 1)
        if plan.width <= 2 * plan.halo or plan.working_set > _WORKING_SET:
            continue
        if best is None or plan.waste < best.waste:
            best = plan
    if best is None:
        return None
    return replace(best, parts=_parts(best.geometry.batch * best.strips, best.grid[0], len(layers)))


def _parts(strips: int, rows: int, layers: int) -> int:
    """Into which strips of so many rows of tiles are cut: enough for threads, and an even number of all, but no part
    without rows."""
    most = max(1, rows // (_PART * layers))
    enough = [parts for parts in range(1, most + 1) if strips * parts >= _UNITS and strips * parts % 2 == 0]
    parts = min(enough, default=most)
    return -(-rows // -(-rows // parts))


def _can_follow(layers: Sequence[WinogradPlan]) -> bool:
    first = layers[0]
    return all(
        layer.offset == (0, 0)
        and (layer.layout.height, layer.layout.width, layer.layout.m, layer.layout.lanes)
        == (first.layout.height, first.layout.width, first.layout.m, first.layout.lanes)
        and (layer.geometry.in_height, layer.geometry.in_width) == (first.layout.height, first.layout.width)
        and layer.blocking.vectors == first.blocking.vectors
        for layer in layers
    )
