"""Sparse weight formats: compressed rows whose column index is what the kernel adds to an address.

numpy only; the frontends and a machine without TVM can use it.
"""

from __future__ import annotations

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
        values, indices: as for SparseRows. What fills short rows up is zero times a channel of zeros.
        indptr: int32, bundles + 1 long, counted in non-zeros of one row.
        filters: int32, the filter of each row of each bundle; as many as there are where there is none, a row of
            products that nobody reads.
    """

    values: NDArray[np.float32]
    indices: NDArray[np.integer]
    indptr: NDArray[np.int32]
    filters: NDArray[np.int32]


def pack_direct(weight: NDArray[np.floating], plan: DirectPlan) -> SparseRows:
    """Rows are (block of channels, output channel), the block first; an index is an offset into the block's planes.

    These are the padded image, as in SkimCaffe (Park et al., "Faster CNNs with direct sparse convolutions and guided
    pruning", ICLR 2017), so stride, dilation, padding and groups cost nothing in the kernel. Where nothing is packed,
    it is a channel of the block.

    Args:
        weight: (K, C / groups, kh, kw).
    """
    geometry = plan.geometry
    _check_shape(weight, geometry.weight_shape)
    out_channel, channel, row, col = np.nonzero(weight)
    channel_block, within = np.divmod(_whole_channel(geometry, out_channel, channel), plan.channels)
    taps = np.array([[plan.tap(r, c) for c in range(geometry.kernel[1])] for r in range(geometry.kernel[0])], np.int64)
    offsets = within * plan.channel_size + taps[row, col] if plan.packed else within
    rows = channel_block * geometry.out_channels + out_channel
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=plan.channel_blocks * geometry.out_channels)
    packed = _rows(weight[out_channel, channel, row, col][order], offsets[order], counts)
    most = plan.channels * (plan.channel_size if plan.packed else 1) - 1
    return replace(packed, indices=packed.indices.astype(np.min_scalar_type(most)))


def pack_winograd(winograd_weight: NDArray[np.floating], plan: WinogradPlan) -> BundledRows:
    """Rows are the filters of a tile position; an index says where a channel lies in the transformed input.

    Args:
        winograd_weight: (K, C / groups, n, n).
    """
    geometry, together = plan.geometry, plan.blocking.together
    filters, positions, places = geometry.out_channels, plan.positions, plan.bundles * plan.blocking.together
    _check_shape(winograd_weight, (*geometry.weight_shape[:2], *winograd_weight.shape[2:]))
    by_position = winograd_weight.transpose(2, 3, 0, 1).reshape(positions, filters, -1)
    position, filter_, channel = np.nonzero(by_position)
    counts = np.bincount(position * filters + filter_, minlength=positions * filters).reshape(positions, filters)
    # Rows of like length share a bundle: little has to be filled up.
    order = np.argsort(-counts, axis=1, kind="stable")
    lengths = np.take_along_axis(counts, order, axis=1)
    lengths = np.pad(lengths, ((0, 0), (0, places - filters))).reshape(-1, together).max(axis=1)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    bundle, lane = np.divmod(position * places + np.argsort(order, axis=1)[position, filter_], together)
    within_row = np.arange(len(position)) - (np.cumsum(counts) - counts.ravel())[position * filters + filter_]
    at = (starts[bundle] + within_row) * together + lane
    values = np.zeros(_storage_length(int(starts[-1]) * together), np.float32)
    values[at] = by_position[position, filter_, channel]
    indices = np.full(len(values), geometry.in_channels)
    indices[at] = _whole_channel(geometry, filter_, channel)
    narrow = np.min_scalar_type(geometry.in_channels * plan.index_step)
    of_row = np.pad(order, ((0, 0), (0, places - filters)), constant_values=filters)
    return BundledRows(
        values,
        (indices * plan.index_step).astype(narrow),
        starts.astype(np.int32),
        of_row.astype(np.int32).ravel(),
    )


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
