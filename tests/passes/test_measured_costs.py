"""Costs measured, and what happens between and beyond them. Measurements are made up here."""

from __future__ import annotations

import json

import pytest
import tvm

from jointsparse.passes.costs import CostModel, LinearCostModel, family
from jointsparse.passes.measured_costs import Measured, MeasuredCostModel, dump, load, shipped
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.targets import cpu_facts

LAYER = ConvGeometry(1, 8, 14, 14, 16, (3, 3), padding=(1, 1, 1, 1))
TARGET = tvm.target.Target("llvm -mcpu=haswell")


class Proportional:
    """A nanosecond for each non-zero, and one more."""

    def cost(self, kernel: str, geometry: ConvGeometry, nonzeros: int, target: tvm.target.Target) -> float:
        return 1e-9 * (nonzeros + 1)


def model(other: CostModel | None = None) -> MeasuredCostModel:
    measured = Measured.of("direct", LAYER, {99: 2e-6, 299: 6e-6})
    return MeasuredCostModel({"avx2": {("direct", LAYER): measured}}, other or Proportional())


@pytest.mark.parametrize(
    ("nonzeros", "microseconds"),
    [(99, 2), (299, 6), (199, 4), (149, 3), (49, 1), (0, 0.02), (599, 12)],
    ids=["measured", "measured too", "between", "a quarter", "below", "none", "above"],
)
def test_between_and_beyond_measurements(nonzeros: int, microseconds: float) -> None:
    assert model().cost("direct", LAYER, nonzeros, TARGET) == pytest.approx(1e-6 * microseconds)


def test_what_was_not_measured_is_predicted() -> None:
    other = ConvGeometry(1, 8, 15, 14, 16, (3, 3), padding=(1, 1, 1, 1))
    for kernel, geometry, target in (
        ("winograd_f4", LAYER, TARGET),
        ("direct", other, TARGET),
        ("direct", LAYER, tvm.target.Target("llvm -mcpu=skylake-avx512")),
    ):
        assert model().cost(kernel, geometry, 99, target) == pytest.approx(1e-7)


def test_more_nonzeros_never_cost_less() -> None:
    noisy = Measured.of("direct", LAYER, {200: 1.5e-6, 10: 1e-6, 100: 2e-6})
    assert noisy.nonzeros == (10, 100, 200)
    assert noisy.seconds == (1e-6, 2e-6, 2e-6)


def test_what_is_measured_is_not_borrowed() -> None:
    neon = tvm.target.Target("llvm -mtriple=aarch64-linux-gnu -mattr=+neon")
    logs = {"neon": {("direct", LAYER): Measured.of("direct", LAYER, {9: 1e-6})}}
    costs = MeasuredCostModel(logs, LinearCostModel())
    assert costs.borrowed_from("direct", LAYER, neon) is None
    assert costs.borrowed_from("dense", LAYER, neon) == LinearCostModel().borrowed_from("dense", LAYER, neon) != None  # noqa: E711
    assert MeasuredCostModel(logs, Proportional()).borrowed_from("dense", LAYER, neon) is None


def test_logs_are_read_as_written() -> None:
    measurements = [Measured.of("direct", LAYER, {99: 2e-6, 299: 6e-6}), Measured.of("dense", LAYER, {1152: 1e-5})]
    text = dump(measurements, 'a "CPU"', "llvm")
    assert json.loads(text)["cpu"] == 'a "CPU"'
    assert list(load(text).values()) == measurements
    with pytest.raises(ValueError, match="not a log of costs"):
        load(text.replace("jointsparse.costs", "something"))


@pytest.mark.parametrize("target", ["llvm -mcpu=haswell", "llvm -mcpu=skylake-avx512"])
def test_what_ships_is_of_every_kernel_that_a_layer_has(target: str) -> None:
    """Else measurements would compete with predictions."""
    log = shipped(family(cpu_facts(tvm.target.Target(target))))
    assert len(log) > 100
    assert all(one.seconds[0] > 0 and len(one.nonzeros) == len(one.seconds) for one in log.values())
    for kernel, geometry in log:
        kernels = {other for other in ("dense", "direct") if (other, geometry) in log}
        assert kernels == {"dense", "direct"}, (kernel, geometry)


def test_families_without_measurements() -> None:
    assert shipped("a family that nobody measured") == {}
