"""The cost model: what it counts, and what follows from it."""

from __future__ import annotations

import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from jointsparse.passes.costs import (
    FAMILIES,
    LinearCostModel,
    break_even_sparsity,
    counts,
    family,
    kind,
    measured_family,
)
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.targets import cpu_facts

TARGETS = ["llvm -mcpu=skylake-avx512", "llvm -mcpu=haswell", "llvm -mtriple=x86_64-linux-gnu",
           "llvm -mtriple=aarch64-linux-gnu -mattr=+neon", "c"]  # fmt: skip
SPARSE_KERNELS = ["direct", "winograd_f2", "winograd_f4"]
LAYER = ConvGeometry(1, 64, 56, 56, 64, (3, 3), padding=(1, 1, 1, 1))
MODEL = LinearCostModel()


class Linear:
    """Seconds by hand."""

    def __init__(self, fixed: float, each: float) -> None:
        self.fixed, self.each = fixed, each

    def cost(self, kernel, geometry, nonzeros, target):
        return self.fixed + self.each * nonzeros


@pytest.mark.parametrize(
    ("fixed", "dense", "share"), [(0.0, 30.0, 0.7), (10.0, 30.0, 0.8), (10.0, 10.0, 1.0), (0.0, 100.0, 0.0)]
)
def test_break_even_is_where_the_costs_meet(fixed, dense, share):
    assert break_even_sparsity(Linear(fixed, 1.0), "direct", LAYER, 100, dense, None) == pytest.approx(share)


def test_no_break_even_where_even_no_weights_cost_more():
    assert break_even_sparsity(Linear(11.0, 1.0), "direct", LAYER, 100, 10.0, None) is None


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_and_kind_has_coefficients_that_count_something(target):
    target = tvm.target.Target(target)
    for groups in (1, 2, 64):
        for size in (1, 3):
            geometry = ConvGeometry(1, 64, 28, 28, 64, (size, size), groups=groups)
            for kernel in ["dense", "direct"] + (SPARSE_KERNELS[1:] if size == 3 else []):
                assert 0 < MODEL.cost(kernel, geometry, 100, target) < 1


@pytest.mark.parametrize("name", FAMILIES)
def test_coefficients_are_of_things_counted_and_not_negative(name):
    for kernel, coefficients in FAMILIES[name].items():
        base = {"direct_1x1": "direct", "direct_fc": "direct"}.get(
            kernel, kernel if kernel in SPARSE_KERNELS else "dense"
        )
        assert coefficients.keys() <= counts(base, LAYER, 10, cpu_facts("llvm")).keys()
        assert min(coefficients.values()) >= 0


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.sampled_from(SPARSE_KERNELS),
    channels=st.sampled_from([1, 3, 16, 128]),
    size=st.integers(5, 300),
    few=st.integers(0, 500),
    more=st.integers(0, 500),
)
def test_costs_do_not_fall_as_weights_are_added(kernel, channels, size, few, more):
    geometry = ConvGeometry(1, channels, size, size, 16, (3, 3), padding=(1, 1, 1, 1))
    target = tvm.target.Target(TARGETS[0])
    assert MODEL.cost(kernel, geometry, few, target) <= MODEL.cost(kernel, geometry, few + more, target)


def test_vectors_cover_the_outputs_of_direct_and_the_tiles_of_winograd():
    cpu = cpu_facts("llvm -mcpu=skylake-avx512")
    assert counts("direct", LAYER, 1, cpu)["vectors"] * cpu.lanes >= 56 * 56
    assert counts("winograd_f4", LAYER, 1, cpu)["vectors"] * cpu.lanes >= 14 * 14
    assert counts("winograd_f2", LAYER, 1, cpu)["inputs"] * cpu.lanes >= 28 * 28 * 16 * 64


def test_kinds_of_dense_convolution():
    assert kind("dense", LAYER) == "dense"
    assert kind("dense", ConvGeometry(1, 64, 8, 8, 64, (1, 1))) == "dense_1x1"
    assert kind("dense", ConvGeometry(1, 64, 8, 8, 64, (3, 3), groups=64)) == "depthwise"
    assert kind("dense", ConvGeometry(1, 64, 8, 8, 64, (3, 3), groups=2)) == "dense_grouped"
    assert kind("direct", LAYER) == "direct"
    assert kind("direct", ConvGeometry(1, 64, 8, 8, 64, (1, 1))) == "direct_1x1"


def test_what_a_family_lacks_is_taken_from_the_nearest_and_told():
    geometry, target = ConvGeometry(1, 8, 20, 20, 8, (3, 3)), tvm.target.Target("llvm -mcpu=haswell")
    cpu = cpu_facts(target)
    near, far = {"direct": {"fixed": 1.0}}, {"direct": {"fixed": 2.0}, "dense": {"fixed": 3.0}}
    model = LinearCostModel({"avx512": far, "avx2": near})
    assert family(cpu) == "avx2"
    assert measured_family("direct", cpu, model.families) == "avx2"
    assert model.cost("direct", geometry, 9, target) == pytest.approx(1e-9)
    assert model.borrowed_from("direct", geometry, target) is None
    assert model.cost("dense", geometry, 9, target) == pytest.approx(3e-9)
    assert model.borrowed_from("dense", geometry, target) == "avx512"


@pytest.mark.parametrize(
    ("target", "kernel", "size", "borrowed"),
    [
        ("llvm -mcpu=skylake-avx512", "direct", 1, None),
        ("llvm -mcpu=haswell", "direct", 3, None),
        ("llvm -mcpu=haswell", "direct", 1, None),
        ("llvm -mtriple=x86_64-linux-gnu", "direct", 3, "avx2"),
        ("llvm -mtriple=aarch64-linux-gnu -mattr=+neon", "winograd_f4", 3, "avx2"),
        ("c", "dense", 3, "avx2"),
    ],
)
def test_what_was_not_measured_is_borrowed(target, kernel, size, borrowed):
    geometry = ConvGeometry(1, 8, 20, 20, 8, (size, size))
    assert MODEL.borrowed_from(kernel, geometry, tvm.target.Target(target)) == borrowed
