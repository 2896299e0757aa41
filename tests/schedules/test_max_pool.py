"""Max pooling, compiled, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tvm import te

from jointsparse.schedules import operators  # noqa: F401  (readies LLVM)
from jointsparse.schedules.max_pool import PoolGeometry, max_pool2d
from jointsparse.schedules.targets import cpu_facts
from tests.host import TARGETS
from tests.schedules.tiled import run

LOWEST = np.finfo(np.float32).min


def images(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def pooled(data: NDArray, geometry: PoolGeometry) -> NDArray:
    """From the definition."""
    (rows, cols), (down, right), (above, left) = geometry.pool, geometry.strides, geometry.padding
    height, width = geometry.out
    below, beyond = (height - 1) * down + rows, (width - 1) * right + cols
    canvas = np.full((*data.shape[:2], max(below, above + data.shape[2]), max(beyond, left + data.shape[3])), LOWEST)
    canvas[:, :, above : above + data.shape[2], left : left + data.shape[3]] = data
    windows = np.lib.stride_tricks.sliding_window_view(canvas, (rows, cols), (2, 3))
    return windows[:, :, : below - rows + 1 : down, : beyond - cols + 1 : right].max((4, 5))


def compiled(data: NDArray, geometry: PoolGeometry, target: str) -> NDArray:
    source = te.placeholder(data.shape, name="data")
    lanes = cpu_facts(target).lanes
    return run([data], [source], max_pool2d(source, geometry, lanes), target)


def square(size: int, pool: int, stride: int, padding: int) -> PoolGeometry:
    out = (size + 2 * padding - pool) // stride + 1
    return PoolGeometry((pool, pool), (stride, stride), (padding, padding), (out, out))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [7, 14, 28, 33, 56, 112])
@pytest.mark.parametrize(("pool", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (2, 2, 0), (5, 1, 2)])
def test_poolings_of_networks(target: str, size: int, pool: int, stride: int, padding: int) -> None:
    data, geometry = images(2, 3, size, size), square(size, pool, stride, padding)
    np.testing.assert_array_equal(compiled(data, geometry, target), pooled(data, geometry))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    pool=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 20)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    out=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    target=st.sampled_from(TARGETS),
)
def test_any_pooling(
    pool: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, int],
    size: tuple[int, int],
    out: tuple[int, int],
    target: str,
) -> None:
    """Also windows that miss the image, and results that leave some of it out or reach far beyond."""
    data, geometry = images(1, 2, *size), PoolGeometry(pool, strides, padding, out)
    np.testing.assert_array_equal(compiled(data, geometry, target), pooled(data, geometry))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pixel", [(0, 0), (0, 13), (6, 7), (13, 0), (13, 13)])
def test_an_infinite_pixel_is_in_its_windows_only(target: str, pixel: tuple[int, int]) -> None:
    data, geometry = images(1, 2, 14, 14), square(14, 3, 1, 1)
    data[:, :, pixel[0], pixel[1]] = np.inf
    np.testing.assert_array_equal(compiled(data, geometry, target), pooled(data, geometry))
