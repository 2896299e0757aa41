"""Costs measured, and what happens between and beyond them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tvm
from tvm import relay

from jointsparse.passes import sparsify
from jointsparse.passes.costs import CostModel, LinearCostModel, family
from jointsparse.passes.measured_costs import MeasuredCostModel, Times, dump, load, shipped
from jointsparse.schedules.constructors import why_not_winograd
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.targets import cpu_facts

LAYER = ConvGeometry(1, 8, 14, 14, 16, (3, 3), padding=(1, 1, 1, 1))
OTHER = ConvGeometry(1, 8, 15, 14, 16, (3, 3), padding=(1, 1, 1, 1))
AVX2 = tvm.target.Target("llvm -mcpu=haswell")
AVX512 = tvm.target.Target("llvm -mcpu=skylake-avx512")
NEON = tvm.target.Target("llvm -mtriple=aarch64-linux-gnu -mattr=+neon")
each_target = pytest.mark.parametrize("target", [AVX2, AVX512], ids=["avx2", "avx512"])


class Proportional:
    """So many nanoseconds for each non-zero."""

    def __init__(self, nanoseconds: float = 1.0) -> None:
        self.nanoseconds = nanoseconds

    def cost(self, kernel: str, geometry: ConvGeometry, nonzeros: int, target: tvm.target.Target) -> float:
        return 1e-9 * self.nanoseconds * nonzeros


def model(other: CostModel) -> MeasuredCostModel:
    return MeasuredCostModel({"avx2": {LAYER: {"direct": Times.of({100: 2e-6, 300: 6e-6})}}}, other)


@pytest.mark.parametrize(
    ("nonzeros", "microseconds"),
    [(100, 2), (300, 6), (200, 4), (150, 3), (50, 1), (0, 0), (600, 12)],
    ids=["measured", "measured too", "between", "a quarter", "below", "none", "above"],
)
def test_between_and_beyond_measurements(nonzeros: int, microseconds: float) -> None:
    assert model(Proportional()).cost("direct", LAYER, nonzeros, AVX2) == pytest.approx(1e-6 * microseconds)


def test_a_model_that_predicts_nothing_is_no_help_beyond() -> None:
    assert model(Proportional(0)).cost("direct", LAYER, 600, AVX2) == 6e-6


@pytest.mark.parametrize(
    ("kernel", "geometry", "target"),
    [("winograd_f4", LAYER, AVX2), ("direct", OTHER, AVX2), ("direct", LAYER, AVX512)],
)
def test_what_was_not_measured_is_predicted(kernel: str, geometry: ConvGeometry, target: tvm.target.Target) -> None:
    assert model(Proportional()).cost(kernel, geometry, 100, target) == pytest.approx(1e-7)


def test_more_nonzeros_never_cost_less() -> None:
    noisy = Times.of({200: 1.5e-6, 10: 1e-6, 100: 2e-6})
    assert noisy == Times((10, 100, 200), (1e-6, 1.5e-6, 1.5e-6))


def test_the_least_of_two_measurements_counts() -> None:
    one, two = Times.of({10: 1e-6, 100: 3e-6, 200: 5e-6}), Times.of({50: 2e-6, 100: 2.5e-6, 200: 6e-6})
    assert one.least(two) == two.least(one) == Times((10, 50, 100, 200), (1e-6, 2e-6, 2.5e-6, 5e-6))


def test_what_is_measured_is_not_borrowed() -> None:
    logs = {"neon": {LAYER: {"direct": Times.of({9: 1e-6})}}}
    costs = MeasuredCostModel(logs, LinearCostModel())
    borrowed = LinearCostModel().borrowed_from("dense", LAYER, NEON)
    assert borrowed is not None
    assert costs.borrowed_from("direct", LAYER, NEON) is None
    assert costs.borrowed_from("dense", LAYER, NEON) == borrowed
    assert MeasuredCostModel(logs, Proportional()).borrowed_from("dense", LAYER, NEON) is None


def test_logs_are_read_as_written() -> None:
    log = {LAYER: {"direct": Times.of({99: 2e-6, 299: 6e-6}), "dense": Times.of({1152: 1e-5})}}
    text = dump(log, "avx2", 'a "CPU"')
    assert json.loads(text)["cpu"] == 'a "CPU"'
    assert load(text, "avx2") == log


@pytest.mark.parametrize("text", ["[]", "{}", "3", dump({}, "avx512", ""), "no JSON"])
def test_what_is_no_log_of_the_family_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a log of costs on avx2|Expecting value"):
        load(text, "avx2")


@each_target
def test_what_ships_is_of_all_kernels_that_a_layer_has(target: tvm.target.Target) -> None:
    """Else measurements would compete with predictions."""
    log = shipped(family(cpu_facts(target)))
    assert len(log) > 80
    for geometry, kernels in log.items():
        tiles = {m for m in (2, 4) if why_not_winograd(geometry, m, target) is None}
        assert kernels.keys() == {"dense", "direct", *(f"winograd_f{m}" for m in tiles)}
        for times in kernels.values():
            assert (np.diff(times.nonzeros) > 0).all()
            assert (np.diff(times.seconds) >= 0).all()
            assert times.seconds[0] > 0
            assert len(times.seconds) == len(times.nonzeros)


def test_families_without_measurements() -> None:
    assert shipped("a family that nobody measured") == {}


@each_target
def test_a_network_goes_by_what_was_measured(target: tvm.target.Target) -> None:
    """A convolution and a fully-connected layer, as the passes find them."""
    convolution = ConvGeometry(1, 64, 56, 56, 64, (3, 3), padding=(1, 1, 1, 1))
    linear = ConvGeometry(1, 512, 1, 1, 1000, (1, 1))
    image = relay.nn.conv2d(
        relay.var("x", shape=(1, 64, 56, 56)), relay.const(np.ones((64, 64, 3, 3), np.float32)), padding=(1, 1)
    )
    weight = relay.const(np.ones((1000, 512), np.float32))
    body = relay.Tuple([image, relay.nn.dense(relay.var("y", shape=(1, 512)), weight)])
    log = shipped(family(cpu_facts(target)))
    plan = sparsify(tvm.IRModule.from_expr(body), None, target)[2]
    for layer, geometry in zip(plan, (convolution, linear), strict=True):
        for kernel in ("dense", "direct"):
            assert layer.costs[kernel] == pytest.approx(1e3 * log[geometry][kernel].seconds[-1])
