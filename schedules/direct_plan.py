"""How a sparse direct convolution is computed: planes of the input, blocks of the output, blocks of channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

from .blocking import PARALLEL_BLOCKS, Cpu
from .geometry import ConvGeometry, round_up

_FLOAT = 4  # bytes
_LINE = 64  # bytes of a line of the cache
_MANY_SUMS = 256 * 1024  # bytes
_FAR = 1024 * 1024  # bytes of input, of which rows read again are no longer near

_PANELS = (1, 2, 4, 8)
"""Panels tried in a block."""

_TOGETHER = (1, 2, 4)
"""Rows of weights: so many indices are loaded at once."""

_SUMS = 1024  # bytes
"""Of a bundle, or those of a row if they are more: what is written at a time. Twice of it was 1 to 9 % slower."""

_SPARE = 8
"""Times what fills up the last bundle of a segment, there are rows in it."""

_THREADS = (1, 2, 4)
_IDLE = 0.3
"""How much idle threads count: one thread is the common case."""

_LAUNCH = 1500  # ns, to give threads their parts of blocks

_SHARES_OF_L1 = (0.5, 0.75, 1.0)
"""For what is packed of a block of channels."""

_NONZERO = 0.2
"""Share of weights for which blocks are chosen."""


@dataclass(frozen=True)
class DirectPlan:
    """All that the kernel is made from, weights apart.

    What the filters read of a channel is packed into *planes*: one for every row of the filter modulo the stride (more
    if lifted), and the same for columns, so that what neighbouring outputs read lies side by side. A filter tap is then
    an offset into the planes, counted through all channels of a block. A 1x1 filter may read the input as it is.

    Attributes:
        geometry: of the convolution; of one with 1x1 filters that reads every pixel, with all pixels in one row.
        lanes: of a vector.
        rows, cols: outputs of a block, down and across.
        channels: input channels of a block of channels.
        panels: parts of a block, of whole rows, whose sums are in registers at a time.
        shifted: whether every column of the filter has planes of its own, whose rows are as long as a block. Where
            these are whole vectors, all are aligned.
        packed: whether there are planes at all.
        together: rows of weights computed side by side: loops, at whose end a core stumbles, are longer and fewer.
        lifted: whether, where a vector holds several rows of outputs, rows of the filter that would begin inside of one
            have planes of their own: with those all vectors are aligned.
    """

    geometry: ConvGeometry
    lanes: int
    rows: int
    cols: int
    channels: int
    panels: int = 1
    shifted: bool = True
    packed: bool = True
    together: int = 1
    lifted: bool = False

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of an image (down, across)."""
        return -(-self.geometry.out_height // self.rows), -(-self.geometry.out_width // self.cols)

    @property
    def all_blocks(self) -> int:
        """Of all images."""
        down, across = self.blocks
        return self.geometry.batch * down * across

    @property
    def blocks_in_parallel(self) -> bool:
        """Whether each block is computed from beginning to end by one thread."""
        return self.all_blocks >= PARALLEL_BLOCKS

    @property
    def in_parts(self) -> bool:
        """Whether parts of the channels of all blocks are packed in parallel, then parts of the filters computed. With
        groups, blocks of channels are in parallel instead."""
        return not self.blocks_in_parallel and self.geometry.groups == 1

    @property
    def part_channels(self) -> int:
        """Channels of a part; the last may have fewer."""
        return self._of_a_part(self.geometry.in_channels)

    @property
    def channel_parts(self) -> int:
        """Of the channels of a block, each packed by one thread; one where blocks are in parallel, not used with
        groups."""
        return -(-self.geometry.in_channels // self.part_channels)

    @property
    def part_filters(self) -> int:
        """Filters of a part; the last may have fewer."""
        return self._of_a_part(self.geometry.out_channels)

    @property
    def filter_parts(self) -> int:
        """Of the filters of a block, each computed by one thread; one where blocks are in parallel, not used with
        groups."""
        return -(-self.geometry.out_channels // self.part_filters)

    @property
    def segments(self) -> int:
        """Of the filters, for each of which every block of channels has bundles of its own."""
        return self.filter_parts if self.geometry.groups == 1 else 1

    @property
    def segment_filters(self) -> int:
        """Filters of a segment; the last may have fewer. With groups, those that read a block of channels."""
        return self.part_filters if self.geometry.groups == 1 else self.geometry.out_channels // self.channel_blocks

    @property
    def bundles(self) -> int:
        """Of a segment: one more than the filters fill, as rows without any weight are in bundles of their own. The
        last may be none."""
        return -(-self.segment_filters // self.together) + (self.together > 1)

    def _of_a_part(self, number: int) -> int:
        """Of so many channels or filters of a block: all blocks together have PARALLEL_BLOCKS parts, or a few more."""
        return -(-number // -(-PARALLEL_BLOCKS // self.all_blocks))

    @property
    def vectors(self) -> int:
        """Of a block."""
        return self.rows * self.cols // self.lanes

    @property
    def panel_vectors(self) -> int:
        """Of a panel."""
        return self.vectors // self.panels

    @property
    def channel_blocks(self) -> int:
        return -(-self.geometry.in_channels // self.channels)

    @property
    def visits(self) -> int:
        """How many blocks of channels a filter sees, each of which adds to its sums."""
        return self.channel_blocks if self.geometry.groups == 1 else 1

    @cached_property
    def phases(self) -> tuple[int, ...]:
        """By planes down: the row, in pixels, that the first output of a block reads first."""
        return tuple(sorted({row % self._rows_apart for row in self._filter_rows}))

    @property
    def _rows_apart(self) -> int:
        """Pixels from a row of the filter to the next with the same planes."""
        return self.geometry.strides[0] * (max(1, self.lanes // self.cols) if self.lifted else 1)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """By planes across: the column, in pixels, that the first output of a block reads first."""
        columns = self._filter_cols
        return tuple(columns) if self.shifted else tuple(sorted({col % self.geometry.strides[1] for col in columns}))

    @property
    def plane_rows(self) -> int:
        return self.rows + max(row - row % self._rows_apart for row in self._filter_rows) // self.geometry.strides[0]

    @cached_property
    def plane_cols(self) -> int:
        """Length of a row of a plane. What outputs beyond the image read there is of no account."""
        if self.shifted:
            return self.cols
        return max(self.cols, round_up(min(self.cols, self.geometry.out_width) + self._reach, self.lanes))

    @cached_property
    def channel_size(self) -> int:
        """Elements of all planes of a channel; a row more where channels would lie a multiple of 4 KiB apart."""
        size = len(self.starts) * len(self.phases) * self.plane_rows * self.plane_cols
        return size + round_up(self.plane_cols, self.lanes) if size % 1024 == 0 else size

    @property
    def planes_channels(self) -> int:
        """Channels whose planes there are at a time."""
        return self.geometry.in_channels if self.in_parts else self.channels

    @property
    def planes_size(self) -> int:
        """Elements of the planes of a block, and of what the last vector reads beyond."""
        if not self.packed:
            return 0
        return self.planes_channels * self.channel_size + round_up(self._reach, self.lanes) + self.lanes

    @property
    def sums_filters(self) -> int:
        """Filters whose sums a thread keeps: those of a part, or of a bundle where it is done with each before the
        next."""
        return self.together if self.visits == 1 else self.part_filters

    @property
    def straddling(self) -> float:
        """Share of the taps whose vectors do not begin where a vector of the planes or of the input does."""
        if not self.packed:
            return float(self.geometry.in_width % self.lanes != 0)
        height, width = self.geometry.kernel
        astray = sum(self.tap(row, col) % self.lanes != 0 for row in range(height) for col in range(width))
        return astray / (height * width)

    @property
    def unit(self) -> int:
        """Elements that an index counts in: one, but rows of the input if it is not packed."""
        return 1 if self.packed else self.geometry.in_width

    def plane(self, start: int, phase: int) -> int:
        """Offset of a plane in its channel; indices into `starts` and `phases`."""
        return (start * len(self.phases) + phase) * self.plane_rows * self.plane_cols

    def tap(self, row: int, col: int) -> int:
        """Offset, in its channel, of what a tap of the filter reads for the first output of a block."""
        down, right = row * self.geometry.dilation[0], col * self.geometry.dilation[1]
        stride, across = self.geometry.strides
        start, phase = right if self.shifted else right % across, down % self._rows_apart
        plane = self.plane(self.starts.index(start), self.phases.index(phase))
        return plane + (down - phase) // stride * self.plane_cols + (right - start) // across

    def operand(self, vector: int) -> int:
        """Offset of a panel's vector from its first, in planes or input."""
        if not self.packed or self.cols < self.lanes:
            return vector * self.lanes
        row, along = divmod(vector * self.lanes, self.cols)
        return row * self.plane_cols + along

    @property
    def _filter_rows(self) -> range:
        height, _ = self.geometry.kernel
        return range(0, height * self.geometry.dilation[0], self.geometry.dilation[0])

    @property
    def _filter_cols(self) -> range:
        _, width = self.geometry.kernel
        return range(0, width * self.geometry.dilation[1], self.geometry.dilation[1])

    @property
    def _reach(self) -> int:
        """How far right of an output its last tap reads, in a row of a plane."""
        return 0 if self.shifted else max(self._filter_cols) // self.geometry.strides[1]


@cache
def direct_plan(geometry: ConvGeometry, cpu: Cpu) -> DirectPlan:
    """The plan for a CPU: the one that takes the least time, by a rough count."""
    shape = in_one_row(geometry)
    return _bundled(min(candidates(shape, cpu), key=lambda plan: _nanoseconds(plan, cpu)), cpu)


def _bundled(plan: DirectPlan, cpu: Cpu) -> DirectPlan:
    """With as many rows together as have their sums in registers, and bundles as good as filled."""
    sums = min(cpu.registers - 2, _SUMS // (plan.lanes * _FLOAT))
    fitting = [number for number in _TOGETHER if number * plan.panel_vectors <= sums]
    full = [number for number in fitting if _SPARE * (-plan.segment_filters % number) <= plan.segment_filters]
    return replace(plan, together=max(full, default=1))


def candidates(geometry: ConvGeometry, cpu: Cpu) -> Iterator[DirectPlan]:
    """Plans with panels whose sums stay in registers."""
    for cols, step in _widths(geometry, cpu.lanes, cpu.accumulators):
        for rows in _heights(geometry, cpu.accumulators * cpu.lanes // cols, step):
            for panels in _PANELS:
                yield from _plans(geometry, cpu, DirectPlan(geometry, cpu.lanes, panels * rows, cols, 1, panels))


def _widths(geometry: ConvGeometry, lanes: int, accumulators: int) -> Iterator[tuple[int, int]]:
    """Columns of a block, and of how many rows vectors are whole."""
    width = geometry.out_width
    if width < lanes:
        cols = 1 << (width - 1).bit_length()
        yield cols, max(1, lanes // cols)
        return
    across = -(-width // (accumulators * lanes))
    widths = {round_up(-(-width // parts), lanes) for parts in range(across, 3 * across + 1)}
    yield from ((cols, 1) for cols in sorted(widths))


def _heights(geometry: ConvGeometry, most: int, step: int) -> Iterator[int]:
    """Rows of a panel, `most` at most; no more than fill the last one about as well as the others."""
    most = max(step, most // step * step)
    down = {-(-geometry.out_height // rows) for rows in range(step, most + 1, step)}
    yield from (round_up(-(-geometry.out_height // panels), step) for panels in sorted(down))


def _plans(geometry: ConvGeometry, cpu: Cpu, plan: DirectPlan) -> Iterator[DirectPlan]:
    """This one packed in one way or the other, or not at all."""
    if plan.panels > 1 and not plan.blocks_in_parallel:
        return
    in_whole_vectors = plan.lanes <= plan.cols <= geometry.out_width
    if plan.rows == geometry.in_height == 1 and in_whole_vectors and _is_pixelwise(geometry):
        yield from _channel_blocks(replace(plan, packed=False), cpu, plan.cols)
    for shifted in (True, False):
        form = replace(plan, shifted=shifted)
        if shifted or (geometry.kernel[1] > 1 and plan.cols >= plan.lanes):
            yield from _channel_blocks(form, cpu, form.channel_size)
    lifted = replace(plan, lifted=True)
    if lifted.phases != plan.phases:
        yield from _channel_blocks(lifted, cpu, lifted.channel_size)


def _channel_blocks(plan: DirectPlan, cpu: Cpu, channel_size: int) -> Iterator[DirectPlan]:
    """Such that what is read of a block of channels stays in L1 while all filters go over it."""
    fitting = (int(cpu.l1 * share) // (channel_size * _FLOAT) for share in _SHARES_OF_L1)
    for channels in sorted({_channels(plan.geometry, number) for number in fitting}):
        yield replace(plan, channels=channels)


def _nanoseconds(plan: DirectPlan, cpu: Cpu) -> float:
    """Roughly, for an image on one thread; only ratios matter.

    Fitted to 2154 measurements of such plans for 29 layers of VDSR, CT-SRCNN, ResNet-18, GoogLeNet, AlexNet and VGG-16,
    80 % zeros, weights cold. Of the plans measured for a layer, 10 to 50, the one that comes first by it takes 1.05
    times as long as the best with AVX-512, 1.08 with AVX2; at worst 1.4 and 1.5, where memory is what counts. Two of
    the coefficients were fitted again to kernels that bundle rows, by 32 layers: 1.035 on average, at worst 1.16.
    """
    geometry, line = plan.geometry, plan.lanes * _FLOAT / _LINE
    _, channels, height, width = geometry.weight_shape
    down, across = plan.blocks
    # How much of L1 is taken by what a block of channels reads, and by the sums that come by in between.
    read = min(1.0, plan.channels * (plan.channel_size if plan.packed else plan.cols) * _FLOAT / cpu.l1)
    sums_bytes = geometry.out_channels * plan.rows * plan.cols * _FLOAT
    passing = min(1.0, sums_bytes / cpu.l1) if plan.visits > 1 else 0.0
    multiply_add = 0.12 + (0.1 * read + 0.02 * passing) * line**2 + 0.17 * plan.straddling * line
    products = _NONZERO * channels * height * width * plan.panels * (0.15 + multiply_add * plan.panel_vectors)
    # Out to L2 and back between blocks of channels; then to the image, worse if many rows are begun at a time.
    sums = plan.vectors * line * (1.0 * (plan.visits - 1) + 1.8 + 0.9 * min(1.0, sums_bytes / _MANY_SUMS))
    packing = 0.0
    if plan.packed:
        elements = plan.plane_cols * (0.95 / _LINE * _FLOAT if geometry.strides[1] <= 2 else 0.095)
        rows = geometry.in_channels * len(plan.phases) * plan.plane_rows
        packing = rows * len(plan.starts) * (0.3 + elements)
        if geometry.in_channels * geometry.in_height * geometry.in_width * _FLOAT > _FAR:
            packing += rows * plan.plane_cols * geometry.strides[1] * _FLOAT / _LINE * 6
    work = down * across * (geometry.out_channels * (products + sums) + packing)
    if plan.blocks_in_parallel:
        return work * (1 + _IDLE * _idle(plan.all_blocks))
    parts = plan.filter_parts if geometry.groups == 1 else plan.channel_blocks
    return work * (1 + _IDLE * _idle(plan.all_blocks * parts)) + _LAUNCH / geometry.batch


def _idle(parts: int) -> float:
    """How much longer than evenly shared work takes in so many parts, over a few numbers of threads."""
    return sum(round_up(parts, threads) / parts - 1 for threads in _THREADS) / len(_THREADS)


def _is_pixelwise(geometry: ConvGeometry) -> bool:
    return geometry.kernel == geometry.strides == (1, 1) and not any(geometry.padding)


def in_one_row(geometry: ConvGeometry) -> ConvGeometry:
    """The same convolution with the whole image in one row, where a filter sees one pixel and none is left out."""
    if not _is_pixelwise(geometry):
        return geometry
    return replace(geometry, in_height=1, in_width=geometry.in_height * geometry.in_width)


def _channels(geometry: ConvGeometry, fitting: int) -> int:
    """Of a block, about as many as fit: whole groups, if there are any, and equally many in all blocks."""
    if geometry.groups == 1:
        blocks = -(-geometry.in_channels // max(1, fitting))
        return -(-geometry.in_channels // blocks)
    of_group = geometry.in_channels // geometry.groups
    together = [g for g in range(1, geometry.groups + 1) if geometry.groups % g == 0 and g * of_group <= fitting]
    return of_group * max(together, default=1)
