"""What kernels have near by before they read or write it, told by themselves: calls take the place of fetches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relay, tir
from tvm.contrib import graph_executor

from jointsparse.schedules import vector_code
from jointsparse.schedules.direct_plan import direct_plan
from jointsparse.schedules.formats import pack_direct
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.sparse_direct import _FILTERS_AHEAD
from jointsparse.schedules.targets import cpu_facts
from jointsparse.schedules.vector_code import LINE, VectorCode
from jointsparse.schedules.winograd_plan import winograd_plan
from tests.host import TARGETS
from tests.schedules.libraries import BOTH, SMALL, build, data_of, expected, sparse, weights

_TOLD = "jointsparse.tests.fetched"
Fetched = Callable[..., "Counter[tuple[int, ...]]"]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, use_threads: Callable[[int], None]) -> Fetched:
    """Places in the result or the data of a convolution of images said to be far, and how often each is fetched."""
    places: Counter[tuple[int, ...]] = Counter()
    tvm.register_func(_TOLD, lambda *index: places.update([index]), override=True)

    def tell(code: VectorCode, buffer: tir.Buffer, *index: tir.PrimExpr) -> None:
        if len(index) > 1:
            is_result = int(buffer.name in ("direct", "winograd"))
            code.ib.emit(tir.Evaluate(tir.call_packed(_TOLD, is_result, *index)))

    monkeypatch.setattr(vector_code, "_FAR", 0)
    monkeypatch.setattr(VectorCode, "fetch", tell)

    def run(geometry: ConvGeometry, tile: int, target: str, *, result: bool = True) -> Counter[tuple[int, ...]]:
        x = relay.var("x", shape=data_of(geometry).shape)
        layer = sparse(x, weights(geometry, tile), geometry, tile, target)
        with tvm.transform.PassContext(opt_level=3):
            library = relay.build(tvm.IRModule.from_expr(relay.Function([x], layer)), target=target)
        use_threads(1)
        executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
        places.clear()
        executor.set_input("x", data_of(geometry))
        executor.run()
        return Counter({place[1:]: count for place, count in places.items() if place[0] == result})

    return run


def geometry_of(batch: int, filters: int, height: int, width: int, size: int = 3, groups: int = 1) -> ConvGeometry:
    return ConvGeometry(batch, 3, height, width, filters, (size, size), padding=(size // 2,) * 4, groups=groups)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("batch", "filters", "height", "width", "size"),
    [(1, 5, 16, 128, 3), (2, 7, 21, 64, 5), (1, 40, 9, 37, 3), (1, 3, 90, 125, 5), (2, 9, 14, 14, 3)],
)
def test_winograd_fetches_all_tiles_once(
    batch: int, filters: int, height: int, width: int, size: int, target: str, fetched: Fetched
) -> None:
    """Of every filter, whatever the form of the layout and the parts."""
    geometry = geometry_of(batch, filters, height, width, size)
    layout = winograd_plan(geometry, 4, cpu_facts(target)).layout
    places = fetched(geometry, 4, target)
    of_filters = Counter(place[:2] for place in places.elements())
    rows = layout.vectors * layout.m
    lines = rows * -(-layout.m * layout.lanes // LINE) if layout.form == "chunks" else rows * layout.m
    assert {key: count for key, count in of_filters.items() if key[1] < filters} == {
        (image, k): lines for image in range(batch) for k in range(filters)
    }
    assert set(places.values()) == {1}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("batch", "filters", "height", "width", "size", "groups"),
    [
        (1, 9, 16, 128, 9, 1),
        (2, 7, 21, 61, 1, 1),
        (1, 40, 9, 37, 3, 1),
        (1, 6, 90, 125, 1, 1),
        (1, 6, 90, 125, 3, 1),
        (2, 9, 96, 125, 3, 3),
        (1, 9, 9, 37, 3, 3),
    ],
)
def test_direct_fetches_what_it_will_write(
    batch: int, filters: int, height: int, width: int, size: int, groups: int, target: str, fetched: Fetched
) -> None:
    """But for the filters of the first bundles of a block, which come too soon."""
    geometry = geometry_of(batch, filters, height, width, size, groups)
    plan = direct_plan(geometry, cpu_facts(target))
    places = fetched(geometry, 0, target)
    ahead = max(1, _FILTERS_AHEAD // plan.together) * plan.together
    last_visits = plan.segments * (plan.channel_blocks if groups > 1 else 1)
    numbers = pack_direct(weights(geometry, 0), plan).filters
    numbers = numbers[-last_visits * plan.bundles * plan.together :]
    assert {k for _, k, _, _ in places} == set(numbers[ahead:]) - {filters}
    _, _, height, width = plan.geometry.out_shape
    for image, k, y in product(range(batch), set(numbers[ahead:]) - {filters}, range(height)):
        row = sorted(place[3] for place in places if place[:3] == (image, k, y))
        assert row[0] == 0
        assert max(np.diff(row), default=0) <= LINE
        assert row[-1] + LINE >= width


@pytest.mark.parametrize("target", TARGETS)
def test_chunks_of_the_next_block_are_fetched(target: str, fetched: Fetched) -> None:
    """While those of the block at hand are read: all but the first block's."""
    geometry = geometry_of(2, 5, 48, 128)
    plan = winograd_plan(geometry, 4, cpu_facts(target))
    assert plan.layout.form == "chunks"
    assert plan.blocks_in_parallel
    assert plan.blocking.even
    places = fetched(geometry, 4, target, result=False)
    size = plan.layout.planes * plan.layout.lanes
    behind = range(1 + plan.blocking.vectors, 1 + plan.layout.vectors)
    assert set(places) >= {
        (image, channel, chunk * size + element)
        for image, channel in np.ndindex(geometry.batch, geometry.in_channels)
        for chunk in behind
        for element in range(0, size, LINE)
    }
    assert set(places.values()) == {1}


@BOTH
def test_operators_fetch_where_the_target_can(tile: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what is far, by instructions of LLVM; code for a C compiler computes the same without."""

    def built(far: int, target: str) -> tvm.relay.backend.executor_factory.GraphExecutorFactoryModule:
        monkeypatch.setattr(vector_code, "_FAR", far)
        x = relay.var("x", shape=data_of(SMALL).shape)
        layer = sparse(x, weights(SMALL, tile), SMALL, tile, target)
        return build(tvm.IRModule.from_expr(relay.Function([x], layer)), target)

    near, far = (built(least, "llvm").get_lib().get_source("ll").count("@llvm.prefetch") for least in (1 << 40, 0))
    assert far > near
    built(0, "c").export_library(tmp_path / "c.so")
    executor = graph_executor.GraphModule(tvm.runtime.load_module(str(tmp_path / "c.so"))["default"](tvm.cpu()))
    executor.set_input("x", data_of(SMALL))
    executor.run()
    want = expected(data_of(SMALL), weights(SMALL, tile), SMALL, tile)
    np.testing.assert_allclose(executor.get_output(0).numpy(), want, rtol=1e-4, atol=1e-4)


def test_what_is_near_is_not_fetched() -> None:
    """Images that L2 holds."""
    assert not vector_code.is_far(64 * 56 * 56)
    assert vector_code.is_far(64 * 224 * 224)
