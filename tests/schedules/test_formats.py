"""Geometry, plans, blocking and the packed weights, without TVM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from jointsparse.schedules.blocking import WinogradBlocking, winograd_blocking
from jointsparse.schedules.direct_plan import DirectPlan, candidates, direct_plan, in_one_row
from jointsparse.schedules.formats import BundledRows, idle_positions, pack_direct, pack_winograd
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.winograd_plan import WinogradPlan, winograd_plan
from tests import reference


@dataclass(frozen=True)
class Cpu:
    lanes: int = 8
    registers: int = 16
    accumulators: int = 12
    l1: int = 32 * 1024
    l2: int = 256 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "do not divide"),
        ({"padding": (0, 0, -1, 0)}, "negative"),
        ({"padding": (1, 1)}, "padding needs 4"),
        ({"strides": (0, 1)}, "strides must be at least 1"),
        ({"in_height": 2, "in_width": 2}, "does not fit"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_bad_geometry(change: dict, message: str) -> None:
    good = {"batch": 1, "in_channels": 4, "in_height": 8, "in_width": 8, "out_channels": 4, "kernel": (3, 3)}
    with pytest.raises(ValueError, match=message):
        ConvGeometry(**{**good, **change})


def test_geometry() -> None:
    geometry = ConvGeometry(2, 6, 20, 21, 9, (3, 5), (2, 3), (1, 0, 2, 4), (2, 1), 3)
    assert geometry.out_shape == (2, 9, 10, 7)
    assert geometry.weight_shape == (9, 2, 3, 5)
    assert geometry.macs == 2 * 10 * 7 * 9 * 2 * 3 * 5


def planes_of(data: NDArray, plan: DirectPlan, down: int, across: int) -> NDArray:
    """What a block reads of the images (C, H, W): (C, planes of a channel), pixels outside the image zero. What may be
    anything is NaN."""
    geometry = plan.geometry
    planes = np.full((geometry.in_channels, plan.channel_size), np.nan)
    for (i, start), (number, phase) in product(enumerate(plan.starts), enumerate(plan.phases)):
        for row in range(plan.plane_rows):
            y = (down * plan.rows + row) * geometry.strides[0] + phase - geometry.padding[0]
            x = (across * plan.cols + np.arange(plan.plane_cols)) * geometry.strides[1]
            x += start - geometry.padding[1]
            inside = (x >= 0) & (x < geometry.in_width)
            to = plan.plane(i, number) + row * plan.plane_cols + np.arange(plan.plane_cols)
            planes[:, to] = 0
            if 0 <= y < geometry.in_height:
                planes[:, to[inside]] = data[:, y, x[inside]]
    return planes


def convolve(data: NDArray, weight: NDArray, plan: DirectPlan) -> NDArray:
    """By nothing but the stored numbers on flat planes, as the kernel does: (C, H, W) to (K, height, width)."""
    geometry = plan.geometry
    rows = pack_direct(weight, plan)
    down, across = plan.blocks
    out = np.zeros((geometry.out_channels, down * plan.rows, across * plan.cols))
    for i, j in np.ndindex(down, across):
        left = j * plan.cols
        if plan.packed:
            flat = planes_of(data, plan, i, j).reshape(-1)
            flat = np.append(flat, np.full(plan.planes_size - plan.planes_channels * plan.channel_size, np.nan))
        else:
            left = min(left, geometry.out_width - plan.cols)
            flat = data.reshape(-1)[left:]
        for k in range(geometry.out_channels):
            sums = sums_of(flat, rows, plan, k).reshape(plan.rows, plan.cols)
            out[k, i * plan.rows : (i + 1) * plan.rows, left : left + plan.cols] = sums
    return out[:, : geometry.out_height, : geometry.out_width]


def places_of(rows: BundledRows, plan: DirectPlan, block: int, k: int) -> list[tuple[int, int]]:
    """(bundle, row of it) wherever a filter is in those of a block of channels."""
    of_block = plan.segments * plan.bundles
    numbers = rows.filters.reshape(-1, plan.together)[block * of_block : (block + 1) * of_block]
    return [(block * of_block + int(bundle), int(row)) for bundle, row in zip(*np.nonzero(numbers == k), strict=True)]


def entries_of(rows: BundledRows, together: int, bundle: int, row: int) -> slice:
    """Of a row's values and indices."""
    return slice(rows.indptr[bundle] * together + row, rows.indptr[bundle + 1] * together + row, together)


def sums_of(flat: NDArray, rows: BundledRows, plan: DirectPlan, k: int) -> NDArray:
    """Of a filter in a block, whose operands these are."""
    sums = np.zeros((plan.panels, plan.panel_vectors, plan.lanes))
    for block in range(plan.channel_blocks):
        places = places_of(rows, plan, block, k)
        if plan.geometry.groups == 1:
            assert places
        first = block * plan.channels * (plan.channel_size if plan.packed else plan.unit)
        for place in places[:1]:
            entries = entries_of(rows, plan.together, *place)
            for e, panel in product(range(len(rows.values))[entries], range(plan.panels)):
                start = first + int(rows.indices[e]) * plan.unit + panel * plan.rows // plan.panels * plan.plane_cols
                for vector in range(plan.panel_vectors):
                    at = start + plan.operand(vector)
                    assert at + plan.lanes <= len(flat)
                    sums[panel, vector] += rows.values[e] * flat[at : at + plan.lanes]
    return sums


def check_plan(plan: DirectPlan, seed: int) -> None:
    geometry, rng = plan.geometry, np.random.default_rng(seed)
    plan = replace(plan, together=int(rng.integers(1, 5)))
    weight = rng.standard_normal(geometry.weight_shape) * (rng.random(geometry.weight_shape) < 0.6)
    data = rng.standard_normal((1, geometry.in_channels, geometry.in_height, geometry.in_width))
    want = reference.conv2d(data, weight, geometry)
    np.testing.assert_allclose(convolve(data[0], weight, plan)[None], want, atol=1e-5)


DIRECT = st.builds(
    lambda groups, kernel, strides, dilation, padding, height, width: ConvGeometry(
        1,
        groups * 2,
        max(1, dilation[0] * (kernel[0] - 1) + 1 - padding[0] - padding[2]) + height,
        max(1, dilation[1] * (kernel[1] - 1) + 1 - padding[1] - padding[3]) + width,
        groups * 2,
        kernel,
        strides,
        padding,
        dilation,
        groups,
    ),
    groups=st.sampled_from([1, 1, 2, 3, 4]),
    kernel=st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 4), st.integers(1, 4))),
    strides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.just((0, 0, 0, 0)), st.tuples(*[st.integers(0, 3)] * 4)),
    height=st.integers(0, 9),
    width=st.integers(0, 40),
)
"""Small ones of every kind."""


@given(geometry=DIRECT, lanes=st.sampled_from([1, 4, 8, 16]), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_an_index_is_the_row_that_a_tap_reads(geometry: ConvGeometry, lanes: int, seed: int) -> None:
    check_plan(direct_plan(geometry, Cpu(lanes=lanes)), seed)


@given(
    geometry=DIRECT,
    rows=st.integers(1, 5),
    cols=st.sampled_from([4, 8, 16]),
    channels=st.integers(1, 3),
    panels=st.integers(1, 3),
    shifted=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_any_blocks_give_the_same(
    geometry: ConvGeometry, rows: int, cols: int, channels: int, panels: int, shifted: bool, seed: int
) -> None:
    """Not only those that are chosen."""
    if geometry.groups > 1:
        channels *= geometry.in_channels // geometry.groups
        channels = channels if geometry.in_channels % channels == 0 else geometry.in_channels
    check_plan(DirectPlan(geometry, 4, panels * rows, cols, channels, panels, shifted), seed)


@given(
    geometry=DIRECT,
    lanes=st.sampled_from([4, 8, 16]),
    rows=st.integers(1, 3),
    panels=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_lifted_rows_are_aligned_and_the_same(
    geometry: ConvGeometry, lanes: int, rows: int, panels: int, seed: int
) -> None:
    cols = 1 << (geometry.out_width - 1).bit_length()
    assume(cols < lanes)
    channels = geometry.in_channels if geometry.groups > 1 else 1
    plan = DirectPlan(geometry, lanes, panels * rows * lanes // cols, cols, channels, panels, lifted=True)
    assert plan.straddling == 0
    check_plan(plan, seed)


@given(
    channels=st.integers(1, 7),
    width=st.integers(4, 60),
    cols=st.sampled_from([4, 8, 16]),
    block=st.integers(1, 7),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_an_input_that_is_not_packed_gives_the_same(
    channels: int, width: int, cols: int, block: int, seed: int
) -> None:
    geometry = ConvGeometry(1, channels, 1, max(width, cols), 3, (1, 1))
    check_plan(DirectPlan(geometry, 4, 1, cols, min(block, channels), packed=False), seed)


@given(geometry=DIRECT, lanes=st.sampled_from([1, 4, 8, 16]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_planes_do_not_overlap(geometry: ConvGeometry, lanes: int) -> None:
    for plan in candidates(in_one_row(geometry), Cpu(lanes=lanes)):
        size = plan.plane_rows * plan.plane_cols
        planes = [plan.plane(i, phase) for i in range(len(plan.starts)) for phase in range(len(plan.phases))]
        assert planes == list(range(0, len(planes) * size, size))
        assert len(planes) * size <= plan.channel_size
        taps = {plan.tap(r, c) for r in range(plan.geometry.kernel[0]) for c in range(plan.geometry.kernel[1])}
        assert len(taps) == plan.geometry.kernel[0] * plan.geometry.kernel[1]
        outputs = (plan.rows - 1) * plan.plane_cols + min(plan.cols, plan.geometry.out_width)
        assert all(tap % size + outputs <= size for tap in taps)


def test_planes_of_channels_are_not_a_multiple_of_4_kib_apart() -> None:
    """They would compete for the same lines of L1."""
    plan = DirectPlan(ConvGeometry(1, 4, 64, 64, 4, (1, 1)), 8, 16, 64, 4)
    assert plan.plane_rows * plan.cols * 4 == 4096
    assert plan.channel_size == (plan.plane_rows + 1) * plan.cols
    check_plan(plan, 0)


def test_an_image_in_one_row() -> None:
    pixelwise = ConvGeometry(2, 3, 7, 9, 5, (1, 1))
    assert in_one_row(pixelwise) == replace(pixelwise, in_height=1, in_width=63)
    assert direct_plan(pixelwise, Cpu()).geometry == in_one_row(pixelwise)
    for other in ({"strides": (1, 2)}, {"padding": (0, 0, 1, 0)}, {"kernel": (1, 3)}):
        assert in_one_row(replace(pixelwise, **other)) == replace(pixelwise, **other)


def test_forms_chosen() -> None:
    """Each where it is the fastest."""
    cpu = Cpu(lanes=16, accumulators=15, l1=48 * 1024)
    same = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
    one_filter = direct_plan(ConvGeometry(1, 64, 256, 256, 1, **same), cpu)
    assert not one_filter.shifted
    assert one_filter.panels > 1
    deep = direct_plan(ConvGeometry(1, 256, 14, 14, 256, **same), cpu)
    assert deep.shifted
    assert deep.panels == 1
    assert not direct_plan(ConvGeometry(1, 64, 56, 56, 64, (1, 1)), cpu).packed
    assert direct_plan(ConvGeometry(1, 832, 7, 7, 256, (1, 1)), cpu).packed
    small = direct_plan(ConvGeometry(1, 256, 14, 14, 512, strides=(2, 2), **same), cpu)
    assert (small.cols, small.lifted, small.straddling) == (8, True, 0)
    assert not deep.lifted


@given(width=st.integers(1, 15), height=st.integers(1, 40))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_below_the_length_of_a_vector_rows_share_vectors(width: int, height: int) -> None:
    plan = direct_plan(ConvGeometry(1, 4, height + 2, width + 2, 4, (3, 3)), Cpu(lanes=16))
    assert plan.blocks[1] == 1
    assert width <= plan.cols < 2 * width
    assert plan.lanes % plan.cols == 0
    assert plan.rows % (plan.lanes // plan.cols) == 0


@pytest.mark.parametrize("together", [1, 2, 3, 4])
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.97])
@pytest.mark.parametrize(("groups", "filters"), [(1, 7), (2, 10), (3, 12), (1, 41)])
@pytest.mark.parametrize(("lanes", "blocks"), [(8, 1), (8, 2), (8, 4), (1, 10)])
def test_winograd_rows_round_trip(
    together: int, sparsity: float, groups: int, filters: int, lanes: int, blocks: int
) -> None:
    geometry = ConvGeometry(1, 6, 40, 9, filters, (3, 3), groups=groups)
    plan = WinogradPlan.of(geometry, 4, lanes, blocks, together)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((filters, 6 // groups, 6, 6)).astype(np.float32)
    weight[rng.random(weight.shape) < sparsity] = 0
    weight[1], weight[:, :, 2, 3] = 0, 0
    rows = pack_winograd(weight, plan)
    assert len(rows.indptr) == 36 * plan.bundles + 1
    assert (plan.bundles - 1) * together < filters <= plan.bundles * together
    assert rows.indptr[0] == 0
    whole = np.zeros((36, filters, 6), np.float32)
    for k in range(filters):
        first = k // (filters // groups) * (6 // groups)
        whole[:, k, first : first + 6 // groups] = weight[k].reshape(-1, 36).T
    numbers = rows.filters.reshape(36, plan.bundles * together)
    # Every filter once, nobody's rows behind them.
    for of_position in numbers:
        assert sorted(of_position[:filters]) == list(range(filters))
        assert set(of_position[filters:]) <= {filters}
    end = together * rows.indptr[-1]
    for bundle, (start, stop) in enumerate(zip(rows.indptr[:-1], rows.indptr[1:], strict=True)):
        longest = 0
        for lane in range(together):
            position, place = divmod(bundle * together + lane, plan.bundles * together)
            k = numbers[position, place]
            want = whole[position, k] if k < filters else np.zeros(6, np.float32)
            nonzeros = np.flatnonzero(want)
            entries = slice(start * together + lane, stop * together + lane, together)
            values, indices = rows.values[entries], rows.indices[entries].astype(np.int64) * plan.index_unit
            longest = max(longest, len(nonzeros))
            assert len(values) == stop - start
            np.testing.assert_array_equal(indices[: len(nonzeros)], nonzeros * plan.tiles)
            np.testing.assert_array_equal(values[: len(nonzeros)], want[nonzeros])
            # Filled up with zeros times zeros: a row must not read what it has no weight for.
            assert not values[len(nonzeros) :].any()
            assert set(indices[len(nonzeros) :]) <= {6 * plan.tiles}
        assert stop - start == longest
    assert np.count_nonzero(rows.values) == np.count_nonzero(weight)
    assert not rows.values[end:].any()
    assert set(rows.indices[end:]) <= {6 * plan.index_step}


@pytest.mark.parametrize("together", [2, 3, 4])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_bundles_are_filled_up_with_little(together: int, sparsity: float) -> None:
    """Sorted, the bundles of a position lack no more than one of the longest rows for each place but the first."""
    filters, channels = 66, 96
    rng = np.random.default_rng(0)
    kept = (1 - sparsity) * 2 * rng.random((filters, 1, 1, 1))
    weight = rng.standard_normal((filters, channels, 4, 4)) * (rng.random((filters, channels, 4, 4)) < kept)
    plan = WinogradPlan.of(ConvGeometry(1, channels, 33, 33, filters, (3, 3)), 2, 8, 4, together)
    rows = pack_winograd(weight, plan)
    counts = np.count_nonzero(weight, axis=1).reshape(filters, 16)
    stored = together * np.diff(rows.indptr).reshape(16, plan.bundles).sum(axis=1)
    assert (stored >= counts.sum(axis=0)).all()
    assert (stored - counts.sum(axis=0) <= (together - 1) * counts.max(axis=0)).all()
    numbers = rows.filters.reshape(16, -1)[:, :filters]
    for position, of_position in enumerate(numbers):
        assert (np.diff(counts[of_position, position]) <= 0).all()
    assert stored.sum() <= len(rows.values) == len(rows.indices) <= max(16, stored.sum() * 9 / 8)


@pytest.mark.parametrize(
    ("channels", "lanes", "step", "dtype"),
    [
        (1, 1, 1, "uint8"),
        (255, 1, 1, "uint8"),
        (256, 1, 1, "uint16"),
        (65_535, 1, 1, "uint16"),
        (65_536, 1, 1, "uint32"),
        (15, 16, 16, "uint8"),
        (16, 16, 16, "uint16"),
        (4095, 16, 16, "uint16"),
        (4096, 16, 16, "uint32"),
    ],
)
def test_channels_are_stored_in_the_fewest_bytes(channels: int, lanes: int, step: int, dtype: str) -> None:
    """That of zeros, behind all others, too."""
    geometry = ConvGeometry(1, channels, 10, 18, 1, (3, 3))
    plan = WinogradPlan.of(geometry, 2, lanes, 1 if lanes > 1 else 32, 2)
    assert plan.index_step == step
    weight = np.zeros((1, channels, 4, 4), np.float32)
    weight[0, -1] = 1
    rows = pack_winograd(weight, plan)
    assert rows.indices.dtype == dtype
    assert set(rows.indices[:32:2]) == {(channels - 1) * step}
    assert set(rows.indices[1:32:2]) == {channels * step}
    # It is the plan, not the weights, that decides: layers of one shape share a kernel.
    assert pack_winograd(np.zeros_like(weight), plan).indices.dtype == dtype


def test_all_zero_weights_have_storage_and_no_entries() -> None:
    geometry = ConvGeometry(1, 2, 9, 9, 4, (3, 3))
    plans = [WinogradPlan.of(geometry, 4, 8, 1, together) for together in (1, 4)]
    rows = pack_direct(np.zeros(geometry.weight_shape), direct_plan(geometry, Cpu()))
    for some in (rows, *(pack_winograd(np.zeros((4, 2, 6, 6)), plan) for plan in plans)):
        assert len(some.values) == len(some.indices) > 0
        assert not some.indptr.any()


@pytest.mark.parametrize("nonzeros", [0, 1, 100, 7373, 100_000])
def test_storage_is_little_more_than_the_nonzeros(nonzeros: int) -> None:
    geometry = ConvGeometry(1, 512, 9, 9, 512, (1, 1))
    weight = np.zeros(geometry.weight_shape)
    weight.reshape(-1)[:nonzeros] = 1
    rows = pack_direct(weight, DirectPlan(geometry, 8, 9, 16, 512))
    assert nonzeros <= len(rows.values) <= max(16, nonzeros * 9 / 8)


@pytest.mark.parametrize(("channels", "dtype"), [(4, "uint8"), (5, "uint16"), (1024, "uint16"), (1025, "uint32")])
def test_offsets_into_planes_are_stored_in_the_fewest_bytes(channels: int, dtype: str) -> None:
    """64 elements to a channel."""
    plan = DirectPlan(ConvGeometry(1, channels, 16, 8, 1, (1, 1), strides=(1, 2)), 4, 16, 4, channels)
    assert plan.channel_size == 64
    weight = np.zeros(plan.geometry.weight_shape)
    weight[0, -1] = 3
    rows = pack_direct(weight, plan)
    assert rows.indices.dtype == dtype
    assert rows.indices[0] == (channels - 1) * 64
    # It is the plan, not the weights, that decides: layers of one shape share a kernel.
    assert pack_direct(np.zeros_like(weight), plan).indices.dtype == dtype


@pytest.mark.parametrize("together", [1, 2, 3, 4])
@pytest.mark.parametrize(("groups", "channels"), [(1, 5), (1, 12), (3, 4), (3, 12)])
def test_rows_are_blocks_of_channels_and_filters(groups: int, channels: int, together: int) -> None:
    geometry = ConvGeometry(1, 12, 9, 9, 9, (3, 2), strides=(2, 1), groups=groups)
    plan = DirectPlan(geometry, 4, 4, 8, channels, together=together)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(geometry.weight_shape) * (rng.random(geometry.weight_shape) < 0.3)
    weight[1] = 0
    rows = pack_direct(weight, plan)
    assert len(rows.indptr) == plan.channel_blocks * plan.segments * plan.bundles + 1
    of_group, found, least = 12 // groups, 0, geometry.out_channels
    for block, k in np.ndindex(plan.channel_blocks, 9):
        want = {}
        for c, r, s in zip(*np.nonzero(weight[k]), strict=True):
            within = k // (9 // groups) * of_group + c - block * channels
            if 0 <= within < channels:
                want[within * plan.channel_size + plan.tap(r, s)] = np.float32(weight[k, c, r, s])
        places = places_of(rows, plan, block, k)
        assert places or not want
        for place in places:
            entries = entries_of(rows, together, *place)
            values, indices = rows.values[entries], rows.indices[entries]
            assert dict(zip(indices[: len(want)], values[: len(want)], strict=True)) == want
            # Filled up with zeros times what the row reads anyway.
            assert not values[len(want) :].any()
            assert set(indices[len(want) :]) <= set(indices[: len(want)])
            found, least = found + 1, min(least, k)
    assert least == 0
    assert found == np.count_nonzero(rows.filters < 9)
    assert not rows.values[rows.indptr[-1] * together :].any()


@pytest.mark.parametrize("sparsity", [0.7, 0.9])
def test_few_zeros_fill_bundles_of_direct_rows(sparsity: float) -> None:
    geometry = ConvGeometry(1, 96, 14, 14, 64, (3, 3), padding=(1, 1, 1, 1))
    weight = np.random.default_rng(0).standard_normal(geometry.weight_shape)
    weight[np.random.default_rng(1).random(weight.shape) < sparsity] = 0
    rows = pack_direct(weight, DirectPlan(geometry, 8, 14, 16, 24, 7, together=4))
    assert np.count_nonzero(weight) <= 4 * rows.indptr[-1] <= 1.1 * np.count_nonzero(weight)


SHAPES = st.builds(
    lambda c, k, h, w, r, p: ConvGeometry(1, c, h + r, w + r, k, (r, r), padding=p),
    st.integers(1, 512),
    st.integers(1, 512),
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from([3, 5]),
    st.tuples(*[st.integers(0, 3)] * 4),
)


@given(geometry=SHAPES, lanes=st.sampled_from([1, 4, 8, 16]), groups=st.sampled_from([1, 1, 2, 4]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_direct_blocks_cover_the_output(geometry: ConvGeometry, lanes: int, groups: int) -> None:
    cpu = Cpu(lanes=lanes)
    channels = groups * geometry.in_channels
    geometry = replace(geometry, in_channels=channels, out_channels=groups * geometry.out_channels, groups=groups)
    plan = direct_plan(geometry, cpu)
    assert (plan.blocks[0] - 1) * plan.rows < geometry.out_height <= plan.blocks[0] * plan.rows
    assert (plan.blocks[1] - 1) * plan.cols < geometry.out_width <= plan.blocks[1] * plan.cols
    assert plan.rows * plan.cols % plan.lanes == 0
    assert 1 <= plan.panel_vectors <= cpu.accumulators
    assert plan.vectors == plan.panels * plan.panel_vectors
    assert plan.rows % plan.panels == 0
    assert (plan.channel_blocks - 1) * plan.channels < channels <= plan.channel_blocks * plan.channels
    # A block of channels is of whole groups.
    assert groups == 1 or channels % plan.channels == plan.channels % (channels // groups) == 0
    # Parts of the channels and of the filters.
    assert (plan.channel_parts - 1) * plan.part_channels < channels <= plan.channel_parts * plan.part_channels
    assert (plan.filter_parts - 1) * plan.part_filters < geometry.out_channels <= plan.filter_parts * plan.part_filters
    assert max(plan.channel_parts, plan.filter_parts) <= (1 if plan.blocks_in_parallel else 4)


@given(geometry=SHAPES, m=st.sampled_from([2, 4]), lanes=st.sampled_from([1, 4, 8, 16]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_winograd_blocks_cover_all_tiles(geometry: ConvGeometry, m: int, lanes: int) -> None:
    cpu = Cpu(lanes=lanes)
    plan = winograd_plan(geometry, m, cpu)
    blocking, vectors = plan.blocking, plan.layout.vectors
    assert blocking.image == vectors
    assert (blocking.vectors - 1) * blocking.blocks < vectors <= blocking.vectors * blocking.blocks
    assert blocking.even == (vectors == blocking.vectors * blocking.blocks)
    assert blocking.together >= 1
    assert blocking.vectors * blocking.together <= cpu.registers * 3 // 4
    # Room for what fills up: a channel of zeros, and a filter that is none.
    assert plan.index_unit * plan.index_step == plan.tiles == blocking.vectors * lanes
    assert plan.input_stride >= (geometry.in_channels + 1) * plan.tiles
    assert plan.product_stride >= (geometry.out_channels + 1) * plan.tiles
    assert plan.parts == (1 if plan.blocks_in_parallel else 4)


@given(
    vectors=st.integers(1, 5000),
    channels=st.integers(1, 600),
    filters=st.integers(1, 600),
    registers=st.integers(2, 32),
    lanes=st.sampled_from([1, 4, 8, 16]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_blocks_and_bundles_are_evenly_filled(
    vectors: int, channels: int, filters: int, registers: int, lanes: int
) -> None:
    blocking = winograd_blocking(vectors, channels, filters, Cpu(lanes=lanes, registers=registers))
    assert blocking.vectors == -(-vectors // blocking.blocks)
    assert blocking.vectors * blocking.together <= registers * 3 // 4
    assert 1 <= blocking.together <= filters
    bundles = -(-filters // blocking.together)
    assert bundles * blocking.together - filters < bundles
    assert blocking == WinogradBlocking(vectors, blocking.blocks, blocking.together)
    # Two threads have equally many, where it matters; of many channels none are made longer for it.
    assert channels <= 128 or blocking.vectors <= max(1, min(32 // lanes, registers * 3 // 8))
    assert registers < 3 or channels > 128 or not 4 <= blocking.blocks < 16 or blocking.blocks % 2 == 0


@pytest.mark.parametrize(("channels", "blocks"), [(64, 4), (128, 4), (129, 7), (256, 7)])
def test_blocks_of_many_channels_are_not_made_longer(channels: int, blocks: int) -> None:
    """What is transformed of them would not stay in L2."""
    assert winograd_blocking(13, channels, 256, Cpu(lanes=16, registers=32)).blocks == blocks


@pytest.mark.parametrize("channels", [31, 32, 63, 64, 127, 128, 255, 256, 512])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_positions_are_not_a_multiple_of_4_kib_apart(channels: int, lanes: int) -> None:
    """They would compete for the same lines of L1."""
    plan = WinogradPlan.of(ConvGeometry(1, channels, 66, 66, channels, (3, 3)), 4, lanes, 9, 4)
    assert 4 * plan.input_stride % 4096
    assert 4 * plan.product_stride % 4096


def test_idle_positions() -> None:
    """Those at which nothing is multiplied; one position is always left."""
    weight = np.zeros((3, 2, 4, 4), np.float32)
    assert idle_positions(weight) == tuple(range(15))
    weight[1, 1, 0, 2] = weight[2, 0, 3, 1] = 1
    assert idle_positions(weight) == tuple(position for position in range(16) if position not in (2, 13))
    assert idle_positions(np.ones_like(weight)) == ()
    plan = WinogradPlan.of(ConvGeometry(1, 2, 9, 9, 3, (3, 3)), 2, 8, 1, 2, idle=idle_positions(weight))
    assert plan.busy == (2, 13)
