"""Sparse weight formats: compressed rows whose column index is what the kernel adds to an address.

numpy only; the frontends and a machine without TVM can use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .direct_plan import DirectPlan
from .geometry import ConvGeometry
from .winograd_plan import WinogradPlan


@dataclass(frozen=True)
class SparseRows:
    """Rows of non-zeros.

    Attributes:
        values: float32, the non-zeros, row after row; zeros after the last one.
        indices: an integer type, same length; where the non-zero's operand lies (its meaning is the packer's).
        indptr: int32, rows + 1 long; row i is ``values[indptr[i]:indptr[i + 1]]``, counted in groups of `group`, and
            may be empty.
        group: non-zeros of a row come in multiples of it, filled up with zeros.
    """

    values: NDArray[np.float32]
    indices: NDArray[np.integer]
    indptr: NDArray[np.int32]
    group: int = 1


@dataclass(frozen=True)
class BundledRows:
    """Rows of non-zeros in bundles: so many rows side by side, the first non-zeros of all, then the second, and so on.

    Attributes:
        values, indices: as for SparseRows. Short rows are filled up with zeros.
        indptr: int32, bundles + 1 long, counted in non-zeros of one row.
        filters: int32, the filter of each row of each bundle; as many as there are where there is none.
    """

    values: NDArray[np.float32]
    indices: NDArray[np.integer]
    indptr: NDArray[np.int32]
    filters: NDArray[np.int32]


def pack_direct(weight: NDArray[np.floating], plan: DirectPlan) -> BundledRows:
    """Rows are (block of channels, segment of the filters, filter); an index is an offset into the block's planes.

    These are the padded image, as in SkimCaffe (Park et al., "Faster CNNs with direct sparse convolutions and guided
    pruning", ICLR 2017), so stride, dilation, padding and groups cost nothing in the kernel. Where nothing is packed,
    it is a channel of the block. What fills a row up points where the row points anyway: zero times an infinity
    elsewhere would be felt. Therefore rows without weights do not share a bundle with others. A bundle with too few
    rows has its last one again: the same thread stores the same sums twice.

    Args:
        weight: (K, C / groups, kh, kw).
    """
    geometry = plan.geometry
    _check_shape(weight, geometry.weight_shape)
    out_channel, channel, row, col = np.nonzero(weight)
    channel_block, within = np.divmod(_whole_channel(geometry, out_channel, channel), plan.channels)
    taps = np.array([[plan.tap(r, c) for c in range(geometry.kernel[1])] for r in range(geometry.kernel[0])], np.int64)
    offsets = within * plan.channel_size + taps[row, col] if plan.packed else within
    most = plan.channels * (plan.channel_size if plan.packed else 1) - 1
    if most > np.iinfo(np.int32).max:
        raise ValueError("offsets exceed 31 bits: the packed input of one block is larger than 8 GB")
    rows = channel_block * geometry.out_channels + out_channel
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=plan.channel_blocks * geometry.out_channels)
    nonzeros = _NonZeros(weight[out_channel, channel, row, col][order], offsets[order], counts)
    places = np.concatenate(
        [
            _bundles_of_segment(block * geometry.out_channels + filters, counts, plan)
            for block in range(plan.channel_blocks)
            for filters in _segments(plan, block)
        ]
    )
    return _in_bundles(nonzeros, places, plan.together, geometry.out_channels, np.min_scalar_type(most))


def _segments(plan: DirectPlan, block: int) -> Iterator[NDArray[np.int64]]:
    """Filters that share out bundles, of a block of channels."""
    if plan.geometry.groups > 1:
        yield np.arange(block * plan.segment_filters, (block + 1) * plan.segment_filters)
        return
    for part in range(plan.segments):
        first = part * plan.segment_filters
        yield np.arange(first, min(first + plan.segment_filters, plan.geometry.out_channels))


def _bundles_of_segment(rows: NDArray[np.int64], counts: NDArray[np.intp], plan: DirectPlan) -> NDArray[np.int64]:
    """Rows by their places; -1 behind them.

    Rows of like length share a bundle: little has to be filled up. Rows alone stay in their order: sums that lie
    one behind the other are read sooner.
    """
    together = plan.together
    if together == 1:
        return np.pad(rows, (0, plan.bundles - len(rows)), constant_values=-1)
    rows = rows[np.argsort(-counts[rows], kind="stable")]
    nonempty = np.count_nonzero(counts[rows])
    alike = [some for some in (rows[:nonempty], rows[nonempty:]) if len(some)]
    filled = np.concatenate([np.pad(some, (0, -len(some) % together), mode="edge") for some in alike])
    return np.pad(filled, (0, plan.bundles * together - len(filled)), constant_values=-1)


def pack_winograd(winograd_weight: NDArray[np.floating], plan: WinogradPlan) -> BundledRows:
    """Rows are the filters of a tile position; an index says where a channel lies in the transformed input.

    What fills a row up is zero times a channel of zeros; rows that are no filter's are of no account.

    Args:
        winograd_weight: (K, C / groups, n, n).
    """
    geometry, together = plan.geometry, plan.blocking.together
    filters, positions, places = geometry.out_channels, plan.positions, plan.bundles * plan.blocking.together
    _check_shape(winograd_weight, (*geometry.weight_shape[:2], *winograd_weight.shape[2:]))
    by_position = winograd_weight.transpose(2, 3, 0, 1).reshape(positions, filters, -1)
    position, filter_, channel = np.nonzero(by_position)
    counts = np.bincount(position * filters + filter_, minlength=positions * filters)
    channels = _whole_channel(geometry, filter_, channel)
    nonzeros = _NonZeros(by_position[position, filter_, channel], channels * plan.index_step, counts)
    # Rows of like length share a bundle: little has to be filled up.
    order = np.argsort(-counts.reshape(positions, filters), axis=1, kind="stable")
    rows = np.arange(positions)[:, None] * filters + order
    rows = np.pad(rows, ((0, 0), (0, places - filters)), constant_values=-1)
    zeros = geometry.in_channels * plan.index_step
    return _in_bundles(nonzeros, rows.ravel(), together, filters, np.min_scalar_type(zeros), zeros)


@dataclass(frozen=True)
class _NonZeros:
    """Row after row. counts: of each row."""

    values: NDArray[np.floating]
    indices: NDArray[np.int64]
    counts: NDArray[np.intp]


def _in_bundles(
    nonzeros: _NonZeros,
    rows: NDArray[np.int64],
    together: int,
    filters: int,
    dtype: np.dtype[np.integer],
    fill: int | None = None,
) -> BundledRows:
    """Rows as they are to lie, bundle after bundle; -1 is nobody's, of any other the number modulo the filters is its
    filter.

    Args:
        dtype: of indices. fill: index of what fills up; of the row's last non-zero if None.
    """
    lengths = np.where(rows < 0, 0, nonzeros.counts[rows])
    longest = lengths.reshape(-1, together).max(axis=1)
    starts = np.concatenate([[0], np.cumsum(longest)])
    place, within = _counted(np.repeat(longest, together))
    at = (starts[place // together] + within) * together + place % together
    is_real = within < lengths[place]
    firsts = np.cumsum(nonzeros.counts) - nonzeros.counts
    source = firsts[rows[place]] + np.minimum(within, lengths[place] - 1)
    values = np.zeros(_storage_length(int(starts[-1]) * together), np.float32)
    values[at[is_real]] = nonzeros.values[source[is_real]]
    indices = np.full(len(values), 0 if fill is None else fill, dtype)
    pointing = is_real if fill is not None else np.ones_like(is_real)
    indices[at[pointing]] = nonzeros.indices[source[pointing]]
    return BundledRows(
        values, indices, starts.astype(np.int32), np.where(rows < 0, filters, rows % filters).astype(np.int32)
    )


def _counted(lengths: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """For every element of so many sequences: its sequence, and its number within."""
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    return sequence, np.arange(len(sequence)) - (np.cumsum(lengths) - lengths)[sequence]


def idle_positions(winograd_weight: NDArray[np.floating]) -> tuple[int, ...]:
    """Positions of a tile at which all filters are zero, ascending; not the last, if that is so at all.

    Args:
        winograd_weight: (K, C / groups, n, n).
    """
    is_busy = np.any(winograd_weight != 0, axis=(0, 1)).ravel()
    is_busy[-1] |= not is_busy.any()
    return tuple(int(position) for position in np.flatnonzero(~is_busy))


def pack_dense(weight: NDArray[np.floating], group: int = 1, segment: int | None = None) -> SparseRows:
    """Rows are (segment of inputs, output unit), the segment first; an index is an input of the segment, in the fewest
    bytes.

    Args:
        weight: (outputs, inputs).
        group: see SparseRows.
        segment: inputs of a segment; all of them when None.
    """
    outputs, inputs = weight.shape
    segment = inputs if segment is None else segment
    output, source = np.nonzero(weight)
    number, within = np.divmod(source, segment)
    order = np.argsort(number, kind="stable")
    counts = np.bincount(number * outputs + output, minlength=-(-inputs // segment) * outputs)
    rows = _rows(weight[output, source][order], within[order], counts, group)
    narrow = np.min_scalar_type(segment - 1)
    return replace(rows, indices=rows.indices.astype(narrow if narrow.itemsize < 4 else np.int32))


def _check_shape(weight: NDArray[np.floating], expected: tuple[int, ...]) -> None:
    if tuple(weight.shape) != expected:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, the geometry says {expected}")


def _whole_channel(
    geometry: ConvGeometry, out_channel: NDArray[np.intp], channel: NDArray[np.intp]
) -> NDArray[np.int64]:
    """Number of the input channel among all groups."""
    group = out_channel // (geometry.out_channels // geometry.groups)
    return (group * (geometry.in_channels // geometry.groups) + channel).astype(np.int64)


def _rows(
    values: NDArray[np.floating], indices: NDArray[np.int64], counts: NDArray[np.intp], group: int = 1
) -> SparseRows:
    if len(indices) and int(indices.max()) > np.iinfo(np.int32).max:
        raise ValueError("offsets exceed 31 bits: the packed input of one block is larger than 8 GB")
    groups = -(-counts // group)
    starts = np.concatenate([[0], np.cumsum(groups)])
    length = _storage_length(int(starts[-1]) * group)
    stored_values = np.zeros(length, np.float32)
    stored_indices = np.zeros(length, np.int32)
    # Where a row's non-zeros go, less where they come from.
    shift = starts[:-1] * group - (np.cumsum(counts) - counts)
    places = np.arange(len(values)) + np.repeat(shift, counts)
    stored_values[places] = values
    stored_indices[places] = indices
    # What fills a row up points where the row points anyway: zero times an infinity elsewhere would be felt.
    missing = groups * group - counts
    filled = np.repeat(starts[:-1] * group + counts - (np.cumsum(missing) - missing), missing) + np.arange(
        missing.sum()
    )
    stored_indices[filled] = np.repeat(indices[(np.cumsum(counts) - 1)[missing > 0]], missing[missing > 0])
    return SparseRows(stored_values, stored_indices, starts.astype(np.int32), group)


def _storage_length(nonzeros: int) -> int:
    """Length to store, at most 1/8 more.

    The length is part of a kernel's type. Rounded, layers of equal shape and like sparsity, with the same idle
    positions, share one compiled kernel.
    """
    granule = 1 << max(4, nonzeros.bit_length() - 4)
    return -(-max(nonzeros, 1) // granule) * granule
