"""How a sparse direct convolution is computed: planes of the input, blocks of the output, blocks of channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

from .blocking import Cpu
from .geometry import ConvGeometry, round_up

_FLOAT = 4  # bytes

_NONZERO = 0.2
"""Share of weights for which blocks are chosen."""


@dataclass(frozen=True)
class DirectPlan:
    """All that the kernel is made from, weights apart.

    For every column of the filter each channel has a *plane* of its own, for every row of the filter modulo the stride
    one more: a plane's rows are as wide as a block of outputs, and what neighbouring outputs read lies side by side
    and, where a row is whole vectors, aligned. A filter tap is then a row of a plane, numbered through all channels.

    Attributes:
        geometry: of the convolution; of one with 1x1 filters that reads every pixel, with all pixels in one row.
        lanes: of a vector.
        rows, cols: outputs of a block, down and across. Rows of planes are `cols` long.
        channels: input channels of a block of channels.
    """

    geometry: ConvGeometry
    lanes: int
    rows: int
    cols: int
    channels: int

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of an image (down, across)."""
        return -(-self.geometry.out_height // self.rows), -(-self.geometry.out_width // self.cols)

    @property
    def vectors(self) -> int:
        """Of a block."""
        return self.rows * self.cols // self.lanes

    @property
    def channel_blocks(self) -> int:
        return -(-self.geometry.in_channels // self.channels)

    @cached_property
    def phases(self) -> tuple[int, ...]:
        """Rows of the filter modulo the stride."""
        return tuple(sorted({row % self.geometry.strides[0] for row in self._filter_rows}))

    @property
    def plane_rows(self) -> int:
        return self.rows + max(self._filter_rows) // self.geometry.strides[0]

    @property
    def channel_rows(self) -> int:
        """Rows of all planes of a channel; one more where channels would lie a multiple of 4 KiB apart."""
        rows = self.geometry.kernel[1] * len(self.phases) * self.plane_rows
        return rows + 1 if rows * self.cols % 1024 == 0 else rows

    @property
    def planes_size(self) -> int:
        """Elements of all planes of a block, and of what the last vector reads beyond."""
        return self.geometry.in_channels * self.channel_rows * self.cols + self.lanes

    def plane_row(self, col: int, phase: int) -> int:
        """First row of a plane, in its channel: column of the filter, index into `phases`."""
        return (col * len(self.phases) + phase) * self.plane_rows

    def tap(self, row: int, col: int) -> int:
        """Row, in its channel, that a tap of the filter reads for the first output of a block."""
        down = row * self.geometry.dilation[0]
        stride = self.geometry.strides[0]
        return self.plane_row(col, self.phases.index(down % stride)) + down // stride

    @property
    def _filter_rows(self) -> range:
        height, _ = self.geometry.kernel
        return range(0, height * self.geometry.dilation[0], self.geometry.dilation[0])


@cache
def direct_plan(geometry: ConvGeometry, cpu: Cpu) -> DirectPlan:
    """The plan for a CPU: the blocks that take the fewest cycles, by a rough count."""
    shape = in_one_row(geometry)
    return min(_candidates(shape, cpu), key=_cycles)


def _candidates(geometry: ConvGeometry, cpu: Cpu) -> Iterator[DirectPlan]:
    """Blocks whose sums stay in registers."""
    lanes, most = cpu.lanes, cpu.accumulators
    if geometry.out_width < lanes:
        cols = 1 << (geometry.out_width - 1).bit_length()
        step = max(1, lanes // cols)
    else:
        across = -(-geometry.out_width // (most * lanes))
        cols, step = round_up(-(-geometry.out_width // across), lanes), 1
        if across > 1 or geometry.out_height == 1:
            # One row: more blocks across may be better than full registers.
            for parts in range(across, 3 * across + 1):
                narrow = round_up(-(-geometry.out_width // parts), lanes)
                yield _plan(geometry, cpu, 1, narrow)
    for rows in range(step, max(step, most * lanes // cols // step * step) + 1, step):
        down = -(-geometry.out_height // rows)
        yield _plan(geometry, cpu, round_up(-(-geometry.out_height // down), step), cols)


def _plan(geometry: ConvGeometry, cpu: Cpu, rows: int, cols: int) -> DirectPlan:
    """With channels whose planes take half of L1 while all filters go over them."""
    plan = DirectPlan(geometry, cpu.lanes, rows, cols, 1)
    return replace(plan, channels=_channels(geometry, cpu.l1 // 2 // (plan.channel_rows * cols * _FLOAT)))


def _cycles(plan: DirectPlan) -> float:
    """Rough cycles for an image. The constants are measured on AVX-512; only ratios matter."""
    geometry, vectors = plan.geometry, plan.vectors
    _, channels, height, width = geometry.weight_shape
    down, across = plan.blocks
    # A non-zero: its value and index, and a multiply-add for each vector.
    products = _NONZERO * geometry.out_channels * channels * height * width * (1.5 + 1.2 * vectors)
    # A filter, each time: its loop left by a jump that was not foreseen, its sums loaded and stored.
    visits = geometry.out_channels * (plan.channel_blocks if geometry.groups == 1 else 1) * (20 + 2 * vectors)
    copied = geometry.in_channels * width * len(plan.phases) * plan.plane_rows * plan.cols / plan.lanes
    copies = copied * (3 if geometry.strides[1] == 1 else 6)
    return down * across * (products + visits + copies)


def in_one_row(geometry: ConvGeometry) -> ConvGeometry:
    """The same convolution with the whole image in one row, where a filter sees one pixel and none is left out."""
    if geometry.kernel != (1, 1) or geometry.strides != (1, 1) or any(geometry.padding):
        return geometry
    return replace(geometry, in_height=1, in_width=geometry.in_height * geometry.in_width)


def _channels(geometry: ConvGeometry, fitting: int) -> int:
    """Of a block, about as many as fit: whole groups, if there are any, and equally many in all blocks."""
    if geometry.groups == 1:
        blocks = -(-geometry.in_channels // max(4, fitting))
        return -(-geometry.in_channels // blocks)
    of_group = geometry.in_channels // geometry.groups
    together = [g for g in range(1, geometry.groups + 1) if geometry.groups % g == 0 and g * of_group <= fitting]
    return of_group * max(together, default=1)
