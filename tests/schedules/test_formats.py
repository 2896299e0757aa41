"""Geometry, layouts, blocking and the packed weights, without TVM."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jointsparse.schedules.blocking import WinogradBlocking, direct_blocking, direct_panel, winograd_blocking
from jointsparse.schedules.formats import pack_direct, pack_winograd
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.layouts import direct_layout
from jointsparse.schedules.winograd_plan import winograd_plan


@dataclass(frozen=True)
class Cpu:
    lanes: int = 8
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


@given(
    strides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_an_index_is_the_offset_of_the_pixel(
    strides: tuple[int, int], dilation: tuple[int, int], kernel: tuple[int, int], seed: int
) -> None:
    """Direct convolution by nothing but the stored numbers on flat planes."""
    rng = np.random.default_rng(seed)
    geometry = ConvGeometry(1, 2, 17, 16, 3, kernel, strides, (0, 0, 0, 0), dilation)
    weight = rng.standard_normal(geometry.weight_shape) * (rng.random(geometry.weight_shape) < 0.5)
    layout = direct_layout(geometry, geometry.out_height, geometry.out_width)
    data = rng.standard_normal((2, 17, 16))
    planes = np.zeros((2, *layout.phases, *layout.plane))
    for a in range(layout.phases[0]):
        for b in range(layout.phases[1]):
            plane = data[:, a :: strides[0], b :: strides[1]][:, : layout.plane[0], : layout.plane[1]]
            planes[:, a, b, : plane.shape[1], : plane.shape[2]] = plane
    rows = pack_direct(weight, geometry, layout)
    flat, places = planes.reshape(-1), np.arange(layout.flat_positions)
    for k in range(3):
        entries = range(rows.indptr[k], rows.indptr[k + 1])
        out = sum((rows.values[e] * flat[rows.indices[e] + places] for e in entries), np.zeros(len(places)))
        grid = np.pad(out, (0, layout.halo[1])).reshape(-1, layout.plane[1])[:, : geometry.out_width]
        want = sum(
            weight[k, c, r, s]
            * data[
                c,
                r * dilation[0] : r * dilation[0] + (geometry.out_height - 1) * strides[0] + 1 : strides[0],
                s * dilation[1] : s * dilation[1] + (geometry.out_width - 1) * strides[1] + 1 : strides[1],
            ]
            for c in range(2)
            for r in range(kernel[0])
            for s in range(kernel[1])
        )
        np.testing.assert_allclose(grid, want, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.97])
def test_winograd_rows_round_trip(group: int, sparsity: float) -> None:
    geometry = ConvGeometry(1, 6, 9, 9, 4, (3, 3), groups=2)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3, 6, 6)) * (rng.random((4, 3, 6, 6)) >= sparsity)
    weight[1] = 0
    rows = pack_winograd(weight, geometry, group)
    assert rows.group == group
    dense, want = np.zeros((6, 6, 4, 6)), np.zeros((6, 6, 4, 6))
    want[:, :, :2, :3], want[:, :, 2:, 3:] = weight[:2].transpose(2, 3, 0, 1), weight[2:].transpose(2, 3, 0, 1)
    for row, (start, end) in enumerate(zip(group * rows.indptr, group * rows.indptr[1:], strict=False)):
        nonzeros = np.flatnonzero(want.reshape(-1, 6)[row])
        values, indices = rows.values[start:end], rows.indices[start:end]
        assert end - start == -(-len(nonzeros) // group) * group
        np.testing.assert_array_equal(indices[: len(nonzeros)], nonzeros)
        # Filled up with zeros of the row's own: they must not read what the row does not.
        assert not values[len(nonzeros) :].any()
        assert set(indices) == set(nonzeros)
        np.add.at(dense.reshape(-1, 6)[row], indices, values)
    np.testing.assert_allclose(dense, want, rtol=1e-6)
    assert np.count_nonzero(rows.values) == np.count_nonzero(weight)
    assert not rows.values[group * rows.indptr[-1] :].any()


@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_channels_are_stored_in_the_fewest_bytes(channels: int, dtype: str) -> None:
    weight = np.zeros((1, channels, 4, 4), np.float32)
    weight[0, -1] = 1
    rows = pack_winograd(weight, ConvGeometry(1, channels, 4, 4, 1, (3, 3)))
    assert rows.indices.dtype == dtype
    assert set(rows.indices[:16]) == {channels - 1}


def test_all_zero_weights_have_storage_and_no_entries() -> None:
    geometry = ConvGeometry(1, 2, 9, 9, 4, (3, 3))
    rows = pack_direct(np.zeros(geometry.weight_shape), geometry, direct_layout(geometry, 7, 7))
    for some in (rows, *(pack_winograd(np.zeros((4, 2, 6, 6)), geometry, group) for group in (1, 4))):
        assert len(some.values) == len(some.indices) > 0
        assert not some.indptr.any()


@pytest.mark.parametrize("nonzeros", [0, 1, 100, 7373, 100_000])
def test_storage_is_little_more_than_the_nonzeros(nonzeros: int) -> None:
    geometry = ConvGeometry(1, 512, 9, 9, 512, (1, 1))
    weight = np.zeros(geometry.weight_shape)
    weight.reshape(-1)[:nonzeros] = 1
    rows = pack_direct(weight, geometry, direct_layout(geometry, 9, 9))
    assert nonzeros <= len(rows.values) <= max(16, nonzeros * 9 / 8)


SHAPES = st.builds(
    lambda c, k, h, w, r, p: ConvGeometry(1, c, h + r, w + r, k, (r, r), padding=p),
    st.integers(1, 512),
    st.integers(1, 512),
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from([3, 5]),
    st.tuples(*[st.integers(0, 3)] * 4),
)


@given(geometry=SHAPES, lanes=st.sampled_from([1, 4, 8, 16]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_direct_blocks_cover_the_output(geometry: ConvGeometry, lanes: int) -> None:
    cpu = Cpu(lanes=lanes)
    layout = direct_blocking(geometry, cpu)
    assert layout.blocks[0] * layout.rows >= geometry.out_height
    assert layout.blocks[1] * layout.cols >= geometry.out_width
    assert direct_panel(layout, cpu) % lanes == 0
    assert direct_panel(layout, cpu) // lanes <= cpu.accumulators


@given(geometry=SHAPES, m=st.sampled_from([2, 4]), lanes=st.sampled_from([1, 4, 8, 16]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_winograd_blocks_cover_all_tiles(geometry: ConvGeometry, m: int, lanes: int) -> None:
    cpu = Cpu(lanes=lanes)
    plan = winograd_plan(geometry, m, cpu)
    blocking, vectors = plan.blocking, plan.result.vectors
    assert (blocking.blocks - 1) * blocking.vectors + blocking.last == vectors
    assert 1 <= blocking.last <= blocking.vectors <= vectors
    assert blocking.split >= 1
    assert blocking.vectors * blocking.split <= cpu.accumulators


@given(vectors=st.integers(1, 5000), accumulators=st.integers(1, 24))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_blocks_are_evenly_filled(vectors: int, accumulators: int) -> None:
    blocking = winograd_blocking(vectors, Cpu(accumulators=accumulators))
    assert blocking.vectors == -(-vectors // blocking.blocks)
    assert blocking.vectors <= accumulators
    assert blocking == WinogradBlocking.of(vectors, blocking.vectors, blocking.split)
