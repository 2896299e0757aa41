"""Libraries of the operators: executors, targets, blocks, and the traps of TVM's own sparse convolution."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relay

from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.schedules.direct_plan import direct_plan
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.targets import cpu_facts
from jointsparse.schedules.winograd_plan import winograd_plan
from tests.host import HASWELL, needs_avx2
from tests.schedules.libraries import (
    BOTH,
    LLVM,
    SMALL,
    build,
    check_plain,
    close,
    data_of,
    expected,
    module,
    run,
    sparse,
    weights,
)

# --- executors and targets


@BOTH
@pytest.mark.parametrize("opt_level", [0, 1, 2, 3])
def test_every_optimisation_level(tile: int, opt_level: int) -> None:
    data = data_of(SMALL)
    want = np.maximum(expected(data, weights(SMALL, tile), SMALL, tile), 0)
    close(run(build(module(SMALL, relay.nn.relu, tile), opt_level=opt_level), x=data), want)


@BOTH
def test_virtual_machine(tile: int) -> None:
    data = data_of(SMALL)
    with tvm.transform.PassContext(opt_level=3):
        executable = relay.vm.compile(module(SMALL, relay.nn.relu, tile), LLVM)
    result = tvm.runtime.vm.VirtualMachine(executable, tvm.cpu()).invoke("main", data).numpy()
    close(result, np.maximum(expected(data, weights(SMALL, tile), SMALL, tile), 0))


@BOTH
def test_ahead_of_time_executor(tile: int, tmp_path: Path) -> None:
    data = data_of(SMALL)
    with tvm.transform.PassContext(opt_level=3):
        factory = relay.build(
            module(SMALL, relay.nn.relu, tile),
            LLVM,
            executor=relay.backend.Executor("aot", {"interface-api": "packed"}),
        )
    factory.export_library(str(tmp_path / "aot.so"))
    loaded = tvm.runtime.load_module(str(tmp_path / "aot.so"))
    executor = tvm.runtime.executor.AotModule(loaded["default"](tvm.cpu()))
    executor.set_input("x", data)
    executor.run()
    close(executor.get_output(0).numpy(), np.maximum(expected(data, weights(SMALL, tile), SMALL, tile), 0))


@BOTH
def test_a_library_needs_only_tvm(tile: int, tmp_path: Path) -> None:
    data = data_of(SMALL)
    build(module(SMALL, relay.nn.relu, tile)).export_library(str(tmp_path / "net.so"))
    np.save(tmp_path / "x.npy", data)
    program = f"""
import sys, numpy, tvm
from tvm.contrib import graph_executor
executor = graph_executor.GraphModule(tvm.runtime.load_module({str(tmp_path / "net.so")!r})["default"](tvm.cpu()))
executor.set_input("x", numpy.load({str(tmp_path / "x.npy")!r}))
executor.run()
numpy.save({str(tmp_path / "y.npy")!r}, executor.get_output(0).numpy())
assert not any(name.startswith("jointsparse.") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    close(np.load(tmp_path / "y.npy"), np.maximum(expected(data, weights(SMALL, tile), SMALL, tile), 0))


@pytest.mark.parametrize("tile", [0, 2, 4], ids=["direct", "winograd F2", "winograd F4"])
def test_as_c_source(tile: int, tmp_path: Path) -> None:
    """Winograd for a target without vectors; TVM's C generator cannot do comparisons of vectors."""
    data = data_of(SMALL)
    x = relay.var("x", shape=data.shape)
    y = relay.nn.relu(sparse(x, weights(SMALL, tile), SMALL, tile, "c"))
    library = build(AbsorbEpilogues()(tvm.IRModule.from_expr(relay.Function([x], y))), "c")
    library.export_library(str(tmp_path / f"source{tile}.so"))
    library = tvm.runtime.load_module(str(tmp_path / f"source{tile}.so"))
    close(run(library, x=data), np.maximum(expected(data, weights(SMALL, tile), SMALL, tile), 0))


# --- the traps of TVM 0.19's own sparse convolution

TRAPS = {
    "padding": ConvGeometry(1, 4, 9, 9, 8, (3, 3), padding=(2, 0, 1, 3)),
    "dilation": ConvGeometry(1, 4, 12, 12, 8, (3, 3), dilation=(2, 3)),
    "groups": ConvGeometry(1, 8, 9, 9, 8, (3, 3), padding=(1, 1, 1, 1), groups=4),
    "depthwise": ConvGeometry(1, 6, 9, 9, 12, (3, 3), padding=(1, 1, 1, 1), groups=6),
    "strides differ": ConvGeometry(1, 4, 11, 12, 8, (3, 3), strides=(1, 3), padding=(1, 1, 1, 1)),
    "remainder channels": ConvGeometry(1, 5, 9, 9, 7, (3, 3), padding=(1, 1, 1, 1)),
    "strided 1x1": ConvGeometry(1, 5, 9, 9, 7, (1, 1), strides=(2, 2)),
    "stride larger than the filter": ConvGeometry(2, 3, 20, 21, 4, (2, 2), strides=(5, 9)),
    "one pixel": ConvGeometry(1, 3, 1, 1, 5, (1, 1)),
    "padding above a row": ConvGeometry(2, 3, 1, 7, 5, (1, 3), strides=(1, 4), padding=(5, 3, 3, 0), dilation=(1, 3)),
}


@pytest.mark.parametrize("name", TRAPS)
def test_direct_traps(name: str) -> None:
    check_plain(TRAPS[name], sparsity=0.4)


@BOTH
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_no_zeros_and_nothing_but_zeros(tile: int, sparsity: float) -> None:
    check_plain(SMALL, tile, sparsity=sparsity)


@pytest.mark.parametrize("tile", [0, 2, 4], ids=["direct", "winograd F2", "winograd F4"])
@pytest.mark.parametrize("filters", [1, 7])
def test_a_channel_that_a_filter_does_not_read_is_not_felt(tile: int, filters: int) -> None:
    """Nor by filters whose rows are filled up beside those that read it."""
    geometry = ConvGeometry(2, 5, 11, 13, filters, (3, 3), padding=(1, 1, 1, 1))
    if tile and filters > 1:
        together = winograd_plan(geometry, tile, cpu_facts(LLVM)).blocking.together
        assert filters % together > 0
    weight, data = weights(geometry, tile, 0.6), data_of(geometry)
    blind = np.arange(filters) % 3 == 0
    weight[blind, 0] = weight[blind, 4] = 0
    want = expected(data, weight, geometry, tile)
    data[:, 0], data[:, 4] = np.inf, np.nan
    x = relay.var("x", shape=data.shape)
    result = run(build(tvm.IRModule.from_expr(relay.Function([x], sparse(x, weight, geometry, tile)))), x=data)
    close(result[:, blind], want[:, blind])
    assert not np.isfinite(result[:, ~blind, 3:8, 3:8]).any()


@BOTH
def test_kernels_run_in_parallel(tile: int) -> None:
    library = build(module(SMALL, relay.nn.relu, tile))
    assert "TVMBackendParallelLaunch" in library.get_lib().get_source("ll")


# By what is shared out: (batch, channels, height and width, filters, groups), of 4x4 tiles with AVX2.
SHARED = {
    "filters of one block": (1, 9, 14, 37, 1),
    "channels fewer than parts": (1, 3, 14, 40, 1),
    "one bundle": (1, 24, 13, 3, 1),
    "two images": (2, 5, 14, 70, 1),
    "three images in groups": (3, 6, 14, 34, 2),
    "two blocks": (1, 7, 28, 33, 1),
    "unequal blocks": (1, 5, 40, 20, 1),
    "many unequal blocks": (2, 3, 57, 6, 1),
    "two indices in one load": (1, 40, 14, 2, 1),
    "four indices in one load": (1, 40, 14, 37, 1),
}


@needs_avx2
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", SHARED)
def test_winograd_shared_out(name: str, threads: int, use_threads: Callable[[int], None]) -> None:
    batch, channels, size, filters, groups = SHARED[name]
    geometry = ConvGeometry(batch, channels, size, size, filters, (3, 3), padding=(1, 1, 1, 1), groups=groups)
    use_threads(threads)
    check_plain(geometry, 4, HASWELL, sparsity=0.7)


def test_what_is_shared_out() -> None:
    """Each way at least once."""
    plans = []
    for batch, channels, size, filters, groups in SHARED.values():
        geometry = ConvGeometry(batch, channels, size, size, filters, (3, 3), padding=(1, 1, 1, 1), groups=groups)
        plans.append(winograd_plan(geometry, 4, cpu_facts(HASWELL)))
    in_parts = [plan for plan in plans if not plan.blocks_in_parallel]
    assert any(plan.geometry.out_channels % plan.parts for plan in in_parts)
    assert any(plan.parts > plan.geometry.in_channels for plan in in_parts)
    assert {plan.all_blocks for plan in in_parts} == {1, 2, 3}
    assert any(plan.blocking.blocks > 1 for plan in in_parts)
    assert sum(plan.blocks_in_parallel and not plan.blocking.even for plan in plans) >= 2
    # Their indices take 16 bits.
    of_many_channels = [plan for plan in plans if plan.geometry.in_channels * plan.index_step > 255]
    assert {2, 4} <= {plan.blocking.together for plan in of_many_channels}


@needs_avx2
def test_so_many_blocks_that_counting_them_needs_64_bits() -> None:
    geometry = ConvGeometry(1, 1, 3000, 4000, 1, (3, 3), padding=(1, 1, 1, 1))
    blocking = winograd_plan(geometry, 4, cpu_facts(HASWELL)).blocking
    assert not blocking.even
    assert blocking.image * blocking.blocks > 2**31
    check_plain(geometry, 4, HASWELL)


# --- blocks


@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry(1, 40, 60, 60, 3, (3, 3), padding=(1, 1, 1, 1)),
        ConvGeometry(1, 24, 9, 700, 3, (5, 5), strides=(1, 2), padding=(2, 1, 0, 2)),
        ConvGeometry(2, 30, 37, 301, 2, (3, 3), strides=(3, 1), dilation=(1, 2)),
    ],
    ids=["rows", "columns", "both"],
)
def test_direct_in_blocks(geometry: ConvGeometry) -> None:
    assert direct_plan(geometry, cpu_facts(LLVM)).blocks != (1, 1)
    check_plain(geometry)


@needs_avx2
@pytest.mark.parametrize(("tile", "size"), [(2, 3), (4, 3), (2, 5)])
@pytest.mark.parametrize("shape", [(7, 5, 130, 170), (32, 33, 61, 35), (96, 3, 30, 29)], ids=["wide", "tall", "deep"])
def test_winograd_in_blocks(tile: int, size: int, shape: tuple[int, int, int, int]) -> None:
    channels, filters, height, width = shape
    geometry = ConvGeometry(2, channels, height, width, filters, (size, size), padding=(1, 2, 1, 0))
    assert winograd_plan(geometry, tile, cpu_facts(HASWELL)).blocking.blocks > 1
    check_plain(geometry, tile, HASWELL)
