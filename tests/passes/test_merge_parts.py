"""Sums of parts become one layer where that is cheaper, gathers become zero weights, and every graph computes what it
did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from tvm import relay

from jointsparse.frontends import from_torch
from jointsparse.frontends.approximation import SparseLowRank
from jointsparse.passes import absorb_gathers, pad_pairs, sparsify
from jointsparse.passes.plan import DENSE, DIRECT, Plan
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.winograd_pruning import ATTRIBUTE, WinogradPruning, dump
from tests.host import HOST
from tests.passes.relay_nets import build_and_run, data, import_torch, in_fp64, prune
from tests.reference import relative_rms


@dataclass(frozen=True)
class Costs:
    """A second for each layer, and some for its multiplications; other kernels than the preferred one are dear."""

    layer: float
    multiplication: float
    kernel: str = DENSE

    def cost(self, kernel: str, geometry: ConvGeometry, nonzeros: int, target: tvm.target.Target) -> float:
        work = self.layer + self.multiplication * nonzeros * geometry.out_height * geometry.out_width
        return work if kernel == self.kernel else 100 * work


FEW_LAYERS, FEW_MULTIPLICATIONS = Costs(1.0, 0.0), Costs(0.0, 1.0)


def channels(total: int, groups: int, kept: int) -> tuple[Tensor, Tensor]:
    """Of each group, some that are kept, and the others."""
    size = total // groups
    order = np.stack([np.random.default_rng(group).permutation(size) + group * size for group in range(groups)])
    own, rest = (torch.from_numpy(np.sort(part, 1).reshape(-1)) for part in (order[:, :kept], order[:, kept:]))
    return own, rest


def approximated(
    inputs: int, outputs: int, kernel: int, kept: int, rank: int, groups: int = 1, **options: Any
) -> SparseLowRank:
    """A convolution as a sum; kept and rank of each group."""
    own, rest = channels(inputs, groups, kept)
    sparse = nn.Conv2d(kept * groups, outputs, kernel, groups=groups, bias=False, **options)
    reduce = nn.Conv2d(inputs - kept * groups, rank * groups, kernel, groups=groups, bias=False, **options)
    expand = nn.Conv2d(rank * groups, outputs, 1, groups=groups)
    return SparseLowRank(sparse, reduce, expand, 1, kept=own, rest=rest)


def network(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.ReLU())


def planned(net: nn.Module, shape: tuple[int, ...], costs: Costs, domain: str = "auto") -> Plan:
    """By both importers: the plans agree, and what is built computes what the network does."""
    x = data(shape)
    plans = []
    for mod, params in (import_torch(net, shape), from_torch(net, torch.zeros(shape))):
        result, left, plan = sparsify(mod, params, HOST, domain, cost_model=costs)
        name = result["main"].params[0].name_hint
        assert relative_rms(run(result, left, x, name), in_fp64(net, x)) < 5e-5
        plans.append(plan)
    first, second = plans
    # Of depthwise layers the weights' shapes differ.
    assert [(layer.kernel, layer.output_shape) for layer in first] == [
        (layer.kernel, layer.output_shape) for layer in second
    ]
    return first


def run(mod: tvm.IRModule, params: dict[str, Any], x: np.ndarray, name: str) -> np.ndarray:
    if name != "x":
        body = tvm.relay.Function([tvm.relay.var("x", shape=x.shape)], mod["main"].body)
        body = tvm.relay.bind(mod["main"], {mod["main"].params[0]: body.params[0]})
        mod = tvm.IRModule.from_expr(body)
    return build_and_run(mod, params, x)


def test_one_layer_again_where_that_is_cheaper() -> None:
    net = network(approximated(12, 10, 3, kept=5, rank=4, padding=1))
    plan = planned(net, (2, 12, 9, 11), FEW_LAYERS)
    assert [layer.weight_shape for layer in plan] == [(10, 12, 3, 3)]
    assert plan["0"].reason.endswith("; one layer again, 3 times as fast as its 3 parts")


def test_parts_stay_where_they_are_cheaper() -> None:
    plan = planned(network(approximated(12, 10, 3, kept=5, rank=4, padding=1)), (1, 12, 9, 11), FEW_MULTIPLICATIONS)
    assert {layer.weight_shape for layer in plan} == {(10, 5, 3, 3), (4, 7, 3, 3), (10, 4, 1, 1)}
    weights, whole = 10 * 5 * 9 + 4 * 7 * 9 + 10 * 4, 10 * 12 * 9
    for layer in plan:
        assert layer.reason.endswith(f"part of 0, which as one layer would take {whole / weights:.2g} times as long")


def test_gathers_become_zero_weights_where_a_sparse_kernel_runs() -> None:
    net = network(approximated(12, 10, 3, kept=5, rank=4, padding=1))
    plan = planned(net, (1, 12, 9, 11), Costs(0.0, 1e-9, DIRECT))
    assert [layer.kernel for layer in plan] == [DIRECT] * 3
    assert {layer.weight_shape for layer in plan} == {(10, 12, 3, 3), (4, 12, 3, 3), (10, 4, 1, 1)}
    assert sum(absorb_gathers.NOTE in layer.reason for layer in plan) == 2
    assert plan["0.sparse"].spatial_sparsity == pytest.approx(7 / 12)


def test_a_fully_connected_layer() -> None:
    own, rest = channels(20, 1, 6)
    layer = SparseLowRank(
        nn.Linear(6, 9, bias=False), nn.Linear(14, 3, bias=False), nn.Linear(3, 9), -1, kept=own, rest=rest
    )
    plan = planned(network(layer), (2, 20), FEW_LAYERS)
    assert [one.weight_shape for one in plan] == [(9, 20)]
    plan = planned(network(layer), (2, 20), FEW_MULTIPLICATIONS)
    assert len(plan) == 3


def test_a_pair_alone_and_its_biases() -> None:
    net = network(nn.Sequential(nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(3, 8, 1)))
    plan = planned(net, (1, 6, 7, 7), FEW_LAYERS)
    assert [layer.weight_shape for layer in plan] == [(8, 6, 3, 3)]
    assert "its 2 parts" in plan["0"].reason


class Reader(nn.Module):
    """Something else reads what lies between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand, self.sparse = nn.Conv2d(6, 3, 3), nn.Conv2d(3, 8, 1), nn.Conv2d(6, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        between = self.reduce(x)
        return torch.cat([self.expand(between) + self.sparse(x), between], 1)


class Strides(nn.Module):
    """Of other geometry."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(6, 8, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


class Sources(nn.Module):
    """Two inputs of the sum: a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) + self.shortcut(x)


class Nonlinear(nn.Module):
    """An activation in the pair."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(6, 3, 3), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(torch.relu(self.reduce(x)))


@pytest.mark.parametrize(
    ("make", "layers"), [(Reader, 3), (Strides, 2), (Sources, 3), (Nonlinear, 2)], ids=lambda one: str(one)
)
def test_what_is_no_sum_of_parts_stays(make: type[nn.Module], layers: int) -> None:
    assert len(planned(make(), (1, 6, 8, 8), FEW_LAYERS)) == layers


def test_channels_sliced_off_are_gathered_too() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sparse, self.reduce, self.expand = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 2, 3), nn.Conv2d(2, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.expand(self.reduce(x[:, 2::2])) + self.sparse(x[:, 1:5])

    plan = planned(Sliced(), (1, 10, 6, 6), FEW_LAYERS)
    assert [layer.weight_shape for layer in plan] == [(8, 10, 3, 3)]


def test_thresholds_of_the_model_keep_its_parts() -> None:
    net = network(approximated(8, 8, 3, kept=3, rank=2, padding=1))
    mod, params = import_torch(net, (1, 8, 8, 8))
    name = next(name for name, value in params.items() if value.shape == (8, 3, 3, 3))
    mod = mod.with_attr(ATTRIBUTE, dump({name: WinogradPruning(4, 0.01)}))
    _, _, plan = sparsify(mod, params, HOST, cost_model=FEW_LAYERS)
    assert len(plan) == 3


def test_nothing_is_predicted_for_other_targets() -> None:
    mod, params = import_torch(network(approximated(8, 8, 3, kept=3, rank=2)), (1, 8, 8, 8))
    _, _, plan = sparsify(mod, params, "cuda", cost_model=FEW_LAYERS)
    assert [layer.kernel for layer in plan] == [DENSE] * 3


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    groups=st.sampled_from([1, 2, 3]),
    size=st.tuples(st.integers(2, 5), st.integers(1, 4)),
    kept=st.integers(1, 4),
    rank=st.integers(1, 3),
    kernel=st.sampled_from([1, 2, 3]),
    options=st.fixed_dictionaries(
        {"stride": st.integers(1, 2), "padding": st.integers(0, 2), "dilation": st.integers(1, 2)}
    ),
    batch=st.integers(1, 2),
    costs=st.sampled_from([FEW_LAYERS, FEW_MULTIPLICATIONS, Costs(0.0, 1e-9, DIRECT)]),
)
def test_random_sums(
    groups: int,
    size: tuple[int, int],
    kept: int,
    rank: int,
    kernel: int,
    options: dict[str, int],
    batch: int,
    costs: Costs,
) -> None:
    inputs, outputs = groups * size[0], groups * size[1]
    torch.manual_seed(0)
    layer = approximated(inputs, outputs, kernel, min(kept, size[0] - 1), rank, groups, **options)
    plan = planned(network(layer), (batch, inputs, 7, 9), costs)
    if costs == FEW_LAYERS:
        assert len(plan) == 1


@pytest.mark.parametrize(
    ("channels", "lanes", "padded"), [(53, 16, 64), (1, 16, 1), (3, 16, 4), (20, 16, 32), (24, 8, 24), (33, 16, 48)]
)
def test_padded_numbers_of_channels(channels: int, lanes: int, padded: int) -> None:
    assert pad_pairs.suitable(channels, lanes) == padded


def test_pairs_are_padded_for_dense_kernels() -> None:
    net = network(nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 40, 1)))
    plan = planned(net, (1, 6, 7, 7), FEW_MULTIPLICATIONS)
    assert [layer.weight_shape for layer in plan] == [(8, 6, 3, 3), (40, 8, 1, 1)]
    assert [layer.name for layer in plan] == ["0.0", "0.1"]


# --- graphs that are not what they look like -------------------------------------------------------------------------


def constant(*shape: int, seed: int = 0) -> relay.Constant:
    return relay.const(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def convolution(
    x: relay.Expr, filters: int, channels: int, size: int = 1, seed: int = 0, groups: int = 1
) -> relay.Expr:
    weight = constant(filters, channels // groups, size, size, seed=seed)
    options = {"channels": filters, "kernel_size": (size, size), "padding": (size // 2, size // 2)}
    return relay.nn.conv2d(x, weight, groups=groups, **options)


Build = Callable[[relay.Expr], relay.Expr]

GRAPHS: dict[str, tuple[Build, int]] = {
    # What is built of x, 1 x 8 x 6 x 7, and how many layers stay.
    "flipped": (
        lambda x: relay.add(
            convolution(relay.strided_slice(x, [0, 5], [4, -7], [1, -1], axes=[1, 2]), 5, 4),
            convolution(relay.strided_slice(x, [4], [8], axes=[1]), 5, 4, seed=1),
        ),
        2,
    ),
    "fewer strides than axes": (
        lambda x: relay.add(
            convolution(relay.strided_slice(x, [0, 1], [1, 5], strides=[2]), 5, 4),
            convolution(relay.strided_slice(x, [4], [8], axes=[1]), 5, 4, seed=1),
        ),
        2,
    ),
    "backwards": (
        lambda x: relay.add(
            convolution(relay.strided_slice(x, [-1], [-9], [-2], axes=[1]), 5, 4),
            convolution(relay.take(x, relay.const([1, 1, 3]), axis=1), 5, 3, seed=1),
        ),
        1,
    ),
    "rows taken": (lambda x: convolution(relay.take(x, relay.const([1, 2, 3]), axis=2), 5, 8, 3), 1),
    "indices beyond": (lambda x: convolution(relay.take(x, relay.const([1, 9]), axis=1, mode="clip"), 5, 2), 1),
    "a grouped layer behind": (lambda x: convolution(convolution(x, 10, 8, 3), 20, 10, groups=2), 2),
    "a constant that makes channels": (
        lambda x: convolution(relay.add(convolution(x, 1, 8), constant(1, 8, 1, 1)), 5, 8, seed=2),
        2,
    ),
    "channels repeated by the sum": (lambda x: relay.add(convolution(x, 1, 8), convolution(x, 5, 8, seed=1)), 2),
    "three parts": (
        lambda x: relay.add(
            relay.add(convolution(x, 5, 8), convolution(x, 5, 8, seed=1)), convolution(x, 5, 8, seed=2)
        ),
        1,
    ),
    "a chain of pairs": (lambda x: convolution(convolution(convolution(x, 6, 8), 5, 6, seed=1), 9, 5, seed=2), 1),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("costs", [FEW_LAYERS, Costs(0.0, 1e-9, DIRECT)], ids=["merge", "direct"])
def test_graphs_compute_what_they_did(name: str, costs: Costs) -> None:
    build, layers = GRAPHS[name]
    x = relay.var("x", shape=(1, 8, 6, 7))
    mod = tvm.IRModule.from_expr(relay.nn.relu(build(x)))
    result, left, plan = sparsify(mod, {}, HOST, cost_model=costs)
    again, _, second = sparsify(result, left, HOST, cost_model=costs)
    values = data((1, 8, 6, 7))
    assert relative_rms(build_and_run(result, left, values), build_and_run(mod, {}, values)) < 5e-5
    if costs is FEW_LAYERS:
        assert len(plan) == layers
        tvm.ir.assert_structural_equal(again["main"], result["main"])
        assert [layer.name for layer in second] == [layer.name for layer in plan]


def test_an_open_batch_is_left_alone() -> None:
    x = relay.var("x", shape=(relay.Any(), 6, 8, 8))
    block = relay.add(relay.nn.bias_add(convolution(x, 6, 6, 3), constant(6)), x)
    _, _, plan = sparsify(tvm.IRModule.from_expr(block), {}, HOST)
    assert [layer.reason.partition(":")[0] for layer in plan] == ["dynamic shape"]


def test_two_sums_of_one_name_are_told_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.b[0](x) + self.b[1](x))
            return self.b[2](x) + self.b[3](x)

    plan = planned(Twice(), (1, 6, 5, 5), FEW_LAYERS)
    assert [layer.name for layer in plan] == ["b", "b#2"]
    assert all("one layer again" in layer.reason for layer in plan)


@pytest.mark.parametrize("size", [14, 28, 56])
@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.95])
def test_what_is_built_is_never_predicted_slower_than_the_parts(size: int, sparsity: float) -> None:
    """By the costs that are shipped, merging a pair of sparse layers does not pay: their product is dense."""
    net = prune(network(approximated(64, 64, 3, kept=8, rank=32, padding=1)), sparsity)
    mod, params = import_torch(net, (1, 64, size, size))
    target = "llvm -mcpu=skylake-avx512"
    _, _, plan = sparsify(mod, params, target)
    parts = [nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(56, 32, 3, padding=1), nn.Conv2d(32, 64, 1)]
    layer = net[0]
    for made, one in zip(parts, (layer.sparse, layer.reduce, layer.expand), strict=True):
        made.weight = one.weight
    apart = [sparsify(*import_torch(one, (1, one.in_channels, size, size)), target)[2].cost for one in parts]
    copies = 64 * size * size * 2 * 0.4e-6
    assert plan.cost <= sum(apart) + copies + 1e-9


def test_a_share_of_the_winograd_weights_is_one_of_those_that_there_are() -> None:
    """Zeros that the passes would put in do not count."""
    layer = approximated(64, 64, 3, kept=8, rank=13, padding=1)
    net = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    mod, params = import_torch(net, (1, 64, 14, 14))
    _, _, plan = sparsify(mod, params, HOST, "winograd", winograd_sparsity=0.5, tile=4)
    assert {one.weight_shape[0] for one in plan} == {64, 13}
    zeros = [
        one.winograd_sparsity["winograd_f4"] * np.prod(one.weight_shape[:2]) for one in plan if one.winograd_sparsity
    ]
    weights = [np.prod(one.weight_shape[:2]) for one in plan if one.winograd_sparsity]
    assert sum(zeros) / sum(weights) == pytest.approx(0.5, abs=0.01)
