"""Networks with fully-connected layers, from sparsify to what they compute, and what the plan says of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relay

from jointsparse.passes import sparsify
from jointsparse.passes.convolutions import find_convolutions
from jointsparse.passes.costs import LinearCostModel, break_even_sparsity
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.winograd_pruning import ATTRIBUTE, WinogradPruning, dump
from tests.host import HASWELL, HOST, needs_avx2
from tests.passes.relay_nets import TOLERANCE, build_and_run, check_domain, data, import_torch, in_fp64
from tests.reference import relative_rms

SPARSE = "jointsparse.dense_sparse"


def pruned(net: nn.Module, sparsity: float) -> nn.Module:
    """Random weights, this share of those of every layer zero."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            module.weight.data[torch.rand_like(module.weight) < sparsity] = 0
    return net.eval()


def head(sparsity: float) -> nn.Module:
    layers = [nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 97), nn.ReLU(), nn.Linear(97, 10)]
    return pruned(nn.Sequential(*layers), sparsity)


def classifier(sparsity: float) -> nn.Module:
    features = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return pruned(nn.Sequential(*features, nn.Linear(8 * 7 * 5, 60), nn.ReLU(), nn.Linear(60, 10)), sparsity)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("domain", ["auto", "spatial", "winograd", "dense"])
def test_a_head(domain, batch):
    plan = check_domain(head(0.9), (batch, 300), domain)
    assert [layer.name for layer in plan] == ["0", "2", "4"]
    assert all(layer.sparse == (domain != "dense") for layer in plan.layers[:2])
    assert [layer.weight_shape for layer in plan] == [(200, 300), (97, 200), (10, 97)]


@pytest.mark.parametrize("target", [HOST, pytest.param(HASWELL, marks=needs_avx2), "llvm"])
@pytest.mark.parametrize("domain", ["spatial", "winograd"])
def test_convolutions_and_a_head(domain, target):
    plan = check_domain(classifier(0.8), (2, 3, 14, 10), domain, target)
    kernel = {"spatial": ["direct"], "winograd": ["winograd_f2", "winograd_f4"]}[domain]
    assert plan.layers[0].kernel in kernel
    assert [layer.kernel for layer in plan.layers[1:]] == ["direct", "direct"]


def test_a_winograd_sparsity_leaves_fully_connected_layers_as_they_are():
    net, shape = pruned(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), 0.5), (1, 3, 2, 2)
    check_domain(net, shape, "winograd", winograd_sparsity=0.9)


def test_the_plan_explains():
    mod, params = import_torch(head(0.9), (1, 300))
    _, _, plan = sparsify(mod, params, "llvm -mcpu=skylake-avx512", "auto")
    layer = plan["0"]
    assert layer.op == "nn.dense"
    assert layer.kernel == "direct"
    assert "times as fast as dense" in layer.reason
    assert layer.unsupported.keys() == {"winograd_f2", "winograd_f4"}
    assert layer.costs.keys() == {"dense", "direct"}
    assert 0 <= layer.break_even["direct"] < layer.spatial_sparsity
    assert layer.multiplications == round(200 * 300 * (1 - layer.spatial_sparsity))
    line = next(line for line in str(plan).splitlines() if line.startswith("0 "))
    assert "200x300" in line
    assert "1x300" in line
    assert json.loads(plan.to_json())["layers"][0]["weight_shape"] == [200, 300]


def test_a_dense_one_says_what_it_would_take():
    mod, params = import_torch(head(0.0), (1, 300))
    _, _, plan = sparsify(mod, params, "llvm -mcpu=haswell", "auto")
    assert plan["0"].kernel == "dense"
    assert "direct needs" in plan["0"].reason
    assert plan["0"].reason.endswith("has 0 %")


@pytest.mark.parametrize("target", ["llvm -mcpu=skylake-avx512", "llvm -mcpu=haswell", "llvm"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("inputs", "outputs"), [(9216, 4096), (4096, 1000), (512, 10)])
def test_the_model_expects_80_percent_to_pay(inputs, outputs, batch, target):
    geometry, target = ConvGeometry(batch, inputs, 1, 1, outputs, (1, 1)), tvm.target.Target(target)
    model, weights = LinearCostModel(), inputs * outputs
    dense = model.cost("dense", geometry, weights, target)
    if weights > 10_000:
        assert break_even_sparsity(model, "direct", geometry, weights, dense, target) < 0.8
    costs = [model.cost("direct", geometry, weights * share // 10, target) for share in range(11)]
    assert costs == sorted(costs)


def test_a_second_time_nothing_changes():
    mod, params = import_torch(head(0.9), (1, 300))
    once, left, _ = sparsify(mod, params, HOST, "spatial")
    twice, _, plan = sparsify(once, left, HOST, "spatial")
    assert [found.op for found in find_convolutions(twice)] == [SPARSE] * 3
    assert {layer.reason for layer in plan} == {"sparse already"}


def test_a_matrix_product_with_a_transposed_parameter():
    """ONNX's MatMul, whose weight is (inputs, outputs)."""
    weight = np.random.default_rng(0).standard_normal((20, 7)).astype(np.float32)
    weight[weight < 0.5] = 0
    x, w = relay.var("x", shape=(3, 20)), relay.var("fc.weight", shape=weight.shape)
    mod = tvm.IRModule.from_expr(relay.nn.dense(x, relay.transpose(w)))
    result, left, plan = sparsify(mod, {"fc.weight": weight}, HOST, "spatial")
    assert left == {}
    assert plan["fc"].sparse
    values = data((3, 20))
    np.testing.assert_allclose(build_and_run(result, left, values), values @ weight, rtol=1e-5, atol=1e-5)


def test_a_dense_layer_beside_sparse_ones_still_computes():
    net = head(0.9)
    net[4].weight.data.normal_()
    mod, params = import_torch(net, (1, 300))
    result, left, plan = sparsify(mod, params, HOST, "auto")
    assert plan["0"].sparse
    x = data((1, 300))
    assert relative_rms(build_and_run(result, left, x), in_fp64(net, x)) < TOLERANCE["spatial"]


def test_a_winograd_threshold_for_a_fully_connected_layer_is_no_silent_one():
    x, w = relay.var("x", shape=(1, 8)), relay.var("fc.weight", shape=(4, 8))
    threshold = dump({"fc.weight": WinogradPruning(4, 0.5, True)})
    mod = tvm.IRModule.from_expr(relay.nn.dense(x, w)).with_attr(ATTRIBUTE, threshold)
    _, _, plan = sparsify(mod, {"fc.weight": data((4, 8))}, HOST, "winograd")
    (warning,) = plan.warnings
    assert "fc.weight" in warning
    assert "fully-connected layers, which Winograd convolution does not reach" in warning
