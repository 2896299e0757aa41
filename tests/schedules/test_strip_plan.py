"""How chains are cut: every tile is given once, known pixels reach as far as they must, and little is kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.strip_plan import StripPlan, strip_plan
from jointsparse.schedules.targets import cpu_facts
from jointsparse.schedules.winograd import transform
from jointsparse.schedules.winograd_plan import WinogradPlan, winograd_plan

MOST = 7 << 18
"""Bytes of a working set."""

CPUS = {name: cpu_facts(name) for name in ("llvm", "llvm -mcpu=haswell", "llvm -mcpu=skylake-avx512")}
RANDOM = settings(
    max_examples=150, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate, Phase.shrink)
)


def layers_of(
    channels: list[int],
    height: int,
    width: int,
    kernels: list[int],
    m: int = 4,
    batch: int = 1,
    target: str = "llvm -mcpu=skylake-avx512",
) -> tuple[WinogradPlan, ...]:
    return tuple(
        winograd_plan(ConvGeometry(batch, c, height, width, k, (size, size), padding=(size // 2,) * 4), m, CPUS[target])
        for c, k, size in zip(channels[:-1], channels[1:], kernels, strict=True)
    )


@st.composite
def chains(draw: st.DrawFn) -> tuple[WinogradPlan, ...]:
    count = draw(st.integers(1, 5))
    return layers_of(
        draw(st.lists(st.integers(1, 48), min_size=count + 1, max_size=count + 1)),
        draw(st.integers(1, 400)),
        draw(st.integers(1, 2500)),
        draw(st.lists(st.sampled_from([3, 5]), min_size=count, max_size=count)),
        draw(st.sampled_from([2, 4])),
        draw(st.integers(1, 3)),
        draw(st.sampled_from(list(CPUS))),
    )


def given_tiles(plan: StripPlan) -> tuple[Counter[int], Counter[int]]:
    """Of all strips columns of tiles, and of all parts rows, as the kernel cuts them."""
    columns: Counter[int] = Counter()
    for strip in range(plan.strips):
        left = strip * (plan.width - 2 * plan.halo) - plan.halo
        columns.update(x for x in range(left + plan.halo, left + plan.width - plan.halo) if x < plan.grid[1])
    tops = [part * plan.rows for part in range(plan.parts)]
    rows = Counter(y for top in tops for y in range(top, min(top + plan.rows, plan.grid[0])))
    return columns, rows


def spoiled(layers: tuple[WinogradPlan, ...]) -> int:
    """Pixels from the edge that meet what lies before it in any sum, by the matrices themselves."""
    m, size = layers[0].layout.m, 40
    bad = np.zeros(size * layers[0].layout.m, bool)
    for layer in layers:
        kernel = layer.geometry.kernel[0]
        at, _, bt = (np.array(matrix) != 0 for matrix in transform(m, kernel).arrays())
        padded = np.concatenate([np.ones(kernel // 2, bool), bad, np.zeros(kernel // 2, bool)])
        tiles = np.lib.stride_tricks.sliding_window_view(padded, m + kernel - 1)[::m]
        bad = ((tiles @ bt.T) @ at.T).ravel()
    assert bad[: bad.sum()].all()
    return int(bad.sum())


@pytest.mark.parametrize(
    ("kernels", "m", "columns"),
    [([3], 4, 1), ([3] * 2, 4, 4), ([3] * 3, 4, 5), ([3] * 6, 2, 6), ([5], 4, 4), ([5] * 2, 2, 4), ([5, 3], 4, 5)],
)
def test_pixels_that_an_edge_spoils(kernels: list[int], m: int, columns: int) -> None:
    layers = layers_of([4] * (len(kernels) + 1), 40, 200, kernels, m)
    assert StripPlan(layers, 1, 1).spoiled == spoiled(layers) == columns
    backward = transform(m, kernels[0]).arrays()
    for matrix in (backward[0], backward[2]):
        np.testing.assert_array_equal(matrix[::-1, ::-1] != 0, matrix != 0, "the other edge is like this one")


@RANDOM
@given(layers=chains())
def test_gives_every_tile_once_out_of_a_bounded_working_set(layers: tuple[WinogradPlan, ...]) -> None:
    plan = strip_plan(layers)
    narrow = all(
        StripPlan(layers, vectors, 1).working_set > MOST
        for vectors in range(1, 1 + -(-layers[0].layout.grid[1] // layers[0].layout.lanes))
        if layers[0].layout.lanes * vectors > 2 * len(layers)
    )
    if plan is None:
        assert narrow
        return
    assert plan.layers == layers
    assert plan.working_set <= MOST
    assert given_tiles(plan) == (Counter(range(plan.grid[1])), Counter(range(plan.grid[0])))
    assert plan.halo == (0 if plan.width >= plan.grid[1] else -(-spoiled(layers) // plan.m))
    assert plan.width > 2 * plan.halo
    assert plan.waste >= 1
    assert plan.parts == 1 or plan.rows >= 4 * len(layers)
    assert plan.units == layers[0].geometry.batch * plan.strips * plan.parts


@RANDOM
@given(layers=chains())
def test_no_other_width_wastes_less(layers: tuple[WinogradPlan, ...]) -> None:
    best = strip_plan(layers)
    for vectors in range(1, 1 + -(-layers[0].layout.grid[1] // layers[0].layout.lanes)):
        other = StripPlan(layers, vectors, 1)
        if other.width > 2 * other.halo and other.working_set <= MOST:
            assert best is not None
            assert replace(best, parts=1).waste <= other.waste


@pytest.mark.parametrize("width", [60, 64, 65, 200])
def test_what_is_kept(width: int) -> None:
    """Three rows of tiles of the input of each layer, with zeros beside them where no others are beyond the edge."""
    plan = StripPlan(layers_of([3, 5, 4], 40, width, [3, 5]), 1, 1)
    assert (plan.grid, plan.width, plan.halo) == ((10, -(-width // 4)), 16, 0 if width <= 64 else 1)
    # One vector more for the zeros where tiles fill the row.
    assert plan.row_stride == (32 if plan.grid[1] == 16 else 16)
    assert plan.plane == {32: 7, 16: 3}[plan.row_stride] * 16
    assert [plan.kept(i) for i in range(2)] == [16 + channels * 16 * plan.plane + 16 for channels in (3, 5)]
    first, second = plan.layers
    assert (first.positions, second.positions) == (36, 64)
    assert plan.inputs == max(36 * first.input_stride, 64 * second.input_stride)
    assert plan.products == max(36 * first.product_stride, 64 * second.product_stride)
    assert plan.working_set == 4 * (plan.kept(0) + plan.kept(1) + plan.inputs + plan.products)


def test_threads_have_parts_to_share() -> None:
    layers = layers_of([32] * 4, 720, 1280, [3] * 3)
    plan = strip_plan(layers)
    assert plan is not None
    assert plan.strips * plan.parts >= 8
    assert plan.waste < 1.3
    small = strip_plan(layers_of([4] * 3, 40, 60, [3] * 2))
    assert small is not None
    assert (small.strips, small.parts) == (1, 1), "of ten rows of tiles two parts would compute much twice"
    single = strip_plan(layers_of([4] * 2, 40, 60, [3]))
    assert single is not None
    assert (single.strips, single.parts) == (1, 2), "nothing twice, but the data is read"
    assert plan.units % 2 == 0, "for two threads alike"
    for height in range(4, 400, 3):
        several = strip_plan(layers_of([8] * 2, height, 64, [3]))
        assert several is not None
        assert (several.parts - 1) * several.rows < several.grid[0], "none without rows"
    many = strip_plan(layers_of([4] * 3, 400, 60, [3] * 2, batch=8))
    assert many is not None
    assert many.parts == 1, "an image for each"


def test_channels_that_do_not_fit() -> None:
    assert strip_plan(layers_of([512, 512], 720, 1280, [3])) is None


def test_more_layers_than_a_narrow_strip_can_carry() -> None:
    """Of 16 tiles, eight layers of 5x5 spoil eight on either side."""
    deep = layers_of([20] * 9, 200, 2000, [5] * 8)
    assert StripPlan(deep, 1, 1).width == 2 * StripPlan(deep, 1, 1).halo
    plan = strip_plan(deep)
    assert plan is None or plan.vectors > 1


def _other(change: str) -> WinogradPlan:
    """A second layer that differs from the first."""
    geometry = ConvGeometry(1, 4, 40, 200, 4, (3, 3), padding=(1, 1, 1, 1))
    cpu = CPUS["llvm -mcpu=skylake-avx512"]
    if change == "tile":
        return winograd_plan(geometry, 2, cpu)
    if change == "lanes":
        return winograd_plan(geometry, 4, CPUS["llvm -mcpu=haswell"])
    if change == "block":
        return WinogradPlan.of(geometry, 4, 16, 1, 4)
    geometries = {
        "smaller": replace(geometry, padding=(0, 0, 0, 0)),
        "moved": replace(geometry, padding=(0, 2, 2, 0)),
        "larger input": replace(geometry, in_height=41, padding=(1, 1, 0, 1)),
        "wider": replace(geometry, in_width=204),
        "same": geometry,
    }
    return winograd_plan(geometries[change], 4, cpu)


@pytest.mark.parametrize("change", ["tile", "lanes", "block", "smaller", "moved", "larger input", "wider"])
def test_what_cannot_follow(change: str) -> None:
    first = _other("same")
    assert strip_plan((first, _other("same"))) is not None
    assert strip_plan((first, _other(change))) is None
    if change in ("smaller", "moved", "larger input"):
        assert strip_plan((_other(change),)) is None, "nor by itself"
