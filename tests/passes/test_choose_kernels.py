"""The choice by cost, and its reasons. Costs are made up here: the choice must follow any cost model."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relay

from jointsparse.passes.choose_kernels import ChooseKernels
from jointsparse.passes.collect_convolutions import CollectConvolutions
from jointsparse.passes.layers import Worklist
from jointsparse.passes.prune_winograd import PruneWinograd
from tests.host import HOST


class Costs:
    """Seconds by kernel: fixed, and for each non-zero."""

    def __init__(self, **costs):
        self.costs = costs

    def cost(self, kernel, geometry, nonzeros, target):
        fixed, each = self.costs[kernel]
        return fixed + each * nonzeros


def choose(domain, costs, *, size=3, zeros=0, dtype="float32"):
    """One layer of 4 x 4 filters, the first ``zeros`` of them zero."""
    weight = np.random.default_rng(0).standard_normal((4, 4, size, size)).astype(dtype)
    weight.reshape(16, size, size)[:zeros] = 0
    body = relay.nn.conv2d(relay.var("x", shape=(1, 4, 8, 8), dtype=dtype), relay.const(weight))
    mod = tvm.IRModule.from_expr(body)
    worklist, target = Worklist(), tvm.target.Target(HOST)
    for step in (
        CollectConvolutions(worklist, {}, target),
        PruneWinograd(worklist),
        ChooseKernels(worklist, target, domain, cost_model=costs),
    ):
        mod = step(mod)
    (layer,) = worklist.layers
    return layer


class BorrowedCosts(Costs):
    """Of which one kernel was measured elsewhere."""

    def borrowed_from(self, kernel, geometry, target):
        return "another" if kernel == "direct" else None


EVEN = {"dense": (100, 0), "direct": (20, 1), "winograd_f2": (40, 0.5), "winograd_f4": (30, 0.5)}


@pytest.mark.parametrize("cheapest", EVEN)
def test_auto_takes_the_cheapest(cheapest):
    layer = choose("auto", Costs(**EVEN | {cheapest: (1, 0)}))
    assert layer.kernel == cheapest


def test_auto_prefers_dense_at_equal_cost():
    same = (7.0, 0)
    assert choose("auto", Costs(dense=same, direct=same, winograd_f2=same, winograd_f4=same)).kernel == "dense"


def test_auto_tells_the_sparsity_at_which_the_nearest_kernel_wins():
    layer = choose("auto", Costs(**EVEN), zeros=4)  # 36 of 144 weights; 64 of 256 in F(2x2)
    assert layer.kernel == "dense"
    assert layer.break_even["direct"] == pytest.approx(1 - 80 / 144)
    assert layer.break_even["winograd_f2"] == pytest.approx(1 - 120 / 256)
    assert layer.break_even["winograd_f4"] == pytest.approx(1 - 140 / 576)
    assert layer.reason == "direct needs 44.4 % to win here, has 25 %"


def test_auto_tells_when_nothing_ever_wins():
    layer = choose("auto", Costs(**EVEN | {"dense": (1, 0)}))
    assert (layer.kernel, layer.break_even) == ("dense", {})
    assert layer.reason == "no sparse kernel wins here, however sparse"


def test_auto_tells_the_gain():
    layer = choose("auto", Costs(**EVEN | {"direct": (20, 0)}))
    assert (layer.kernel, layer.reason) == ("direct", "5 times as fast as dense")


def test_auto_tells_when_the_next_kernel_would_win():
    layer = choose("auto", Costs(**EVEN | {"dense": (1000, 0)}))  # direct 164, F(2x2) 168, F(4x4) 318
    assert layer.kernel == "direct"
    assert layer.overtaken["winograd_f2"] == pytest.approx(1 - 248 / 256)
    assert layer.overtaken["winograd_f4"] == pytest.approx(1 - 268 / 576)
    assert layer.reason == "6.1 times as fast as dense; winograd_f2 needs 3.12 % to win here, has 0 %"


def test_dense_is_dense_whatever_the_cost():
    layer = choose("dense", Costs(**EVEN | {"direct": (0, 0)}))
    assert (layer.kernel, layer.reason) == ("dense", "asked for")


def test_spatial_forces_direct_and_says_what_it_costs():
    layer = choose("spatial", Costs(**EVEN))
    assert layer.kernel == "direct"
    assert layer.reason == "asked for, slower than dense: direct needs 44.4 % to win here, has 0 %"


def test_winograd_forces_the_cheaper_tile():
    assert choose("winograd", Costs(**EVEN | {"dense": (0, 0)})).kernel == "winograd_f2"
    layer = choose("winograd", Costs(**EVEN | {"winograd_f4": (0, 0)}))
    assert (layer.kernel, layer.reason) == ("winograd_f4", "asked for")


def test_winograd_runs_direct_outside_its_reach_and_says_so():
    layer = choose("winograd", Costs(**EVEN), size=1)
    assert (layer.kernel, layer.reason) == ("direct", "filter 1x1 is outside Winograd's reach (3x3 or 5x5)")


@pytest.mark.parametrize("domain", ["auto", "spatial", "winograd", "dense"])
def test_a_layer_left_alone_keeps_its_reason_in_every_domain(domain):
    layer = choose(domain, Costs(**EVEN), dtype="float16")
    assert (layer.kernel, layer.costs) == ("dense", {})
    assert layer.reason == "data type float16: the sparse kernels compute in float32"


def test_what_the_model_borrowed_is_told():
    assert choose("auto", BorrowedCosts(**EVEN)).borrowed == {"direct": "another"}
    assert choose("auto", Costs(**EVEN)).borrowed == {}
