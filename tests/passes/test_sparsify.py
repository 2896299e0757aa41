"""From a model to what it computes: sparsify, relay.build, run, against fp64."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relay
from tvm.relay import testing

from jointsparse.passes import sparsify
from jointsparse.passes.convolutions import find_convolutions
from jointsparse.passes.plan import TILE
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.winograd import transform
from jointsparse.schedules.winograd_pruning import ATTRIBUTE, WinogradPruning, separating_threshold
from tests import reference
from tests.host import HASWELL, HOST, needs_avx2
from tests.passes import networks
from tests.passes.relay_nets import (
    TOLERANCE,
    build_and_run,
    check_domain,
    data,
    import_torch,
    in_fp64,
    prune,
    settle,
)
from tests.reference import relative_rms

SPARSE_DOMAINS = ["spatial", "winograd"]


def kernels(plan):
    return {layer.kernel for layer in plan}


# --- whole networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["auto", "spatial", "winograd", "dense"])
def test_every_attribute_that_a_careless_rewrite_gets_wrong(domain):
    net = prune(settle(networks.oddities()), 0.6)
    plan = check_domain(net, (2, 3, 17, 21), domain)
    assert len(plan) == 7
    if domain in SPARSE_DOMAINS:
        assert all(layer.sparse for layer in plan)
    if domain == "winograd":
        assert plan[plan.layers[-1].name].kernel in TILE


@pytest.mark.parametrize("domain", SPARSE_DOMAINS)
def test_resnet(domain):
    plan = check_domain(prune(settle(networks.resnet20(width=8, blocks=1)), 0.7), (1, 3, 32, 32), domain)
    assert [layer.name for layer in plan][:2] == ["0.0", "2.conv1.0"]
    assert all(layer.sparse for layer in plan)


@pytest.mark.parametrize("domain", SPARSE_DOMAINS)
def test_mobilenet(domain):
    check_domain(prune(settle(networks.mobilenet()), 0.7), (1, 3, 33, 35), domain)


@pytest.mark.parametrize("domain", SPARSE_DOMAINS)
def test_super_resolution(domain):
    plan = check_domain(prune(settle(networks.ct_srcnn()), 0.8), (1, 1, 37, 43), domain)
    if domain == "winograd":
        assert [layer.kernel in TILE for layer in plan] == [False] + [True] * 8


@pytest.mark.parametrize("target", ["llvm", pytest.param(HASWELL, marks=needs_avx2)])
@pytest.mark.parametrize("domain", SPARSE_DOMAINS)
def test_other_vector_lengths(domain, target):
    net = prune(settle(nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 7, 5))), 0.7)
    check_domain(net, (1, 3, 19, 23), domain, target)


@pytest.mark.parametrize("domain", SPARSE_DOMAINS)
def test_batch_norm_as_parameters_before_and_after_convolutions(domain):
    """relay.testing's pre-activation ResNet; its BatchNorm comes first, its references are TVM's own dense build."""
    mod, params = testing.resnet.get_workload(num_layers=8, num_classes=10, image_shape=(3, 28, 28))
    rng = np.random.default_rng(0)
    for name, value in params.items():
        if name.endswith("moving_mean"):
            params[name] = tvm.nd.array(rng.normal(scale=0.3, size=value.shape).astype("float32"))
        if name.endswith("gamma"):
            params[name] = tvm.nd.array(rng.uniform(-1.5, 1.5, value.shape).astype("float32"))
    x = data((1, 3, 28, 28))
    result, left, plan = sparsify(mod, params, HOST, domain)
    assert all(layer.sparse for layer in plan)
    with tvm.transform.PassContext(opt_level=0):
        library = relay.build(mod, target="llvm", params=params)
    executor = tvm.contrib.graph_executor.GraphModule(library["default"](tvm.cpu()))
    executor.run(data=x)
    built = relay.build(result, target=HOST, params=left)
    sparse = tvm.contrib.graph_executor.GraphModule(built["default"](tvm.cpu()))
    sparse.run(data=x)
    assert relative_rms(sparse.get_output(0).numpy(), executor.get_output(0).numpy()) < TOLERANCE[domain]


# --- pruning in the Winograd domain -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("tile", "size"), [(2, 3), (4, 3), (4, 5)])
def test_a_pruned_layer_computes_the_pruned_function(tile, size):
    """Not the dense one: the tile grid is part of the function."""
    net = settle(nn.Sequential(nn.Conv2d(6, 10, size, padding=1, bias=False)))
    mod, params = import_torch(net, (1, 6, 23, 18))
    result, left, plan = sparsify(mod, params, HOST, "winograd", winograd_sparsity=0.7, tile=tile)
    (layer,) = plan
    assert layer.winograd_sparsity[layer.kernel] == pytest.approx(0.7, abs=0.001)
    x = data((1, 6, 23, 18))
    expected = in_fp64(net, x)
    output = build_and_run(result, left, x)
    dense = transform(tile, size).filters(net[0].weight.detach().numpy())
    magnitude = np.abs(dense) * transform(tile, size).importance()
    pruned = np.where(magnitude <= separating_threshold(magnitude, 0.7), 0, dense)
    geometry = ConvGeometry(1, 6, 23, 18, 10, (size, size), padding=(1, 1, 1, 1))
    assert relative_rms(output, reference.winograd(x, pruned, geometry, tile)) < TOLERANCE["winograd"]
    assert relative_rms(output, expected) > 0.1


def test_thresholds_of_the_model_hold_with_batch_norm_in_relay():
    """The threshold speaks of the stored weight; BatchNorm, folded here, scales what is left."""
    net = settle(nn.Sequential(nn.Conv2d(5, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)))
    mod, params = import_torch(net, (1, 5, 14, 14))
    threshold = [0.004 * (k + 1) for k in range(8)]
    attribute = {"0.weight": {"tile": 4, "origin": [0, 0], "threshold": threshold, "weighted": False}}
    mod = mod.with_attr(ATTRIBUTE, json.dumps(attribute))
    result, left, plan = sparsify(mod, params, HOST, "winograd")
    x = data((1, 5, 14, 14))
    weight, norm = net[0].weight.detach().numpy(), net[1]
    pruned = WinogradPruning(4, tuple(threshold), False).filters(weight)
    assert 0.1 < np.mean(pruned == 0) < 0.9
    assert plan["0"].winograd_sparsity == {"winograd_f4": np.mean(pruned == 0)}
    geometry = ConvGeometry(1, 5, 14, 14, 8, (3, 3), padding=(1, 1, 1, 1))
    convolved = torch.from_numpy(reference.winograd(x, pruned, geometry, 4))
    expected = norm.double()(convolved).detach().numpy()
    assert relative_rms(build_and_run(result, left, x), expected) < TOLERANCE["winograd"]


def test_pruning_leaves_every_other_domain_as_it_was():
    net = settle(nn.Sequential(nn.Conv2d(4, 4, 3)))
    for domain in ("spatial", "dense"):
        check_domain(net, (1, 4, 12, 12), domain, winograd_sparsity=0.9)


# --- what it leaves alone ---------------------------------------------------------------------------------------------


def small(**attrs):
    x, weight = relay.var("x", shape=(1, 4, 10, 10)), relay.var("conv.weight", shape=(4, 4, 3, 3))
    body = relay.nn.relu(relay.nn.conv2d(x, weight, padding=(1, 1), **attrs))
    weights = np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype("float32")
    return tvm.IRModule.from_expr(relay.Function([x, weight], body)), {"conv.weight": tvm.nd.array(weights)}


def test_arguments_are_left_as_they_were():
    mod, params = import_torch(settle(networks.mobilenet(4)), (1, 3, 16, 16))
    mod = mod.with_attr(ATTRIBUTE, json.dumps({}))
    text, hashed = mod.astext(), tvm.ir.structural_hash(mod)
    copies = {name: value.numpy().copy() for name, value in params.items()}
    for domain in SPARSE_DOMAINS:
        sparsify(mod, params, HOST, domain)
    assert mod.astext() == text
    assert tvm.ir.structural_hash(mod) == hashed
    assert params.keys() == copies.keys()
    assert all(np.array_equal(params[name].numpy(), copies[name]) for name in copies)


@pytest.mark.parametrize("domain", ["auto", "spatial", "winograd", "dense"])
def test_twice_is_once(domain):
    mod, params = import_torch(prune(settle(networks.oddities()), 0.8), (1, 3, 17, 21))
    once, left, plan = sparsify(mod, params, HOST, domain)
    twice, _, again = sparsify(once, left, HOST, domain)
    tvm.ir.assert_structural_equal(once, twice)
    assert [layer.kernel for layer in plan] == [layer.kernel for layer in again]
    assert all(layer.reason == "sparse already" for layer in again if layer.sparse)


def test_parameters_bound_before_make_no_difference():
    mod, params = small()
    bound = tvm.IRModule.from_expr(relay.build_module.bind_params_by_name(mod["main"], params))
    tvm.ir.assert_structural_equal(sparsify(mod, params, HOST, "spatial")[0], sparsify(bound, None, HOST, "spatial")[0])


def test_without_parameters_the_weights_are_not_at_hand():
    mod, _ = small()
    result, left, plan = sparsify(mod, None, HOST, "spatial")
    assert left == {}
    assert not plan["conv"].sparse
    assert plan["conv"].reason == "no weights at hand: conv.weight is an input of the module; pass it in params"
    assert [var.name_hint for var in result["main"].params] == ["x", "conv.weight"]


def test_parameters_that_the_module_does_not_have_remain():
    mod, params = small()
    other = tvm.nd.array(np.zeros(3, "float32"))
    assert sparsify(mod, params | {"other": other}, HOST)[1] == {"other": other}


def test_a_weight_used_twice_and_elsewhere():
    x, weight = relay.var("x", shape=(1, 4, 10, 10)), relay.var("w", shape=(4, 4, 3, 3))
    first = relay.nn.conv2d(x, weight, padding=(1, 1))
    second = relay.nn.conv2d(relay.nn.relu(first), weight, strides=(2, 2))
    body = relay.add(second, relay.sum(weight))
    mod = tvm.IRModule.from_expr(relay.Function([x, weight], body))
    value = np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype("float32")
    result, left, plan = sparsify(mod, {"w": value}, HOST, "winograd")
    assert [layer.name for layer in plan] == ["w", "w#2"]
    assert [layer.kernel in TILE for layer in plan] == [True, False]
    x_value = data((1, 4, 10, 10))
    filters = torch.from_numpy(value.astype(np.float64))
    expected = nn.functional.conv2d(torch.from_numpy(x_value.astype(np.float64)), filters, padding=1).relu()
    expected = (nn.functional.conv2d(expected, filters, stride=2) + filters.sum()).numpy()
    assert relative_rms(build_and_run(result, left, x_value), expected) < TOLERANCE["winograd"]


def test_partitions_of_other_compilers_and_other_functions_are_untouched():
    weight = relay.const(np.ones((4, 4, 3, 3), "float32"))

    def function():
        data_in = relay.var("d", shape=(1, 4, 10, 10))
        body = relay.nn.conv2d(data_in, weight, padding=(1, 1))
        return relay.Function([data_in], body, relay.TensorType((1, 4, 10, 10)))

    partition = function().with_attr("Compiler", "dnnl").with_attr("global_symbol", "dnnl_0")
    x = relay.var("x", shape=(1, 4, 10, 10))
    helper = relay.GlobalVar("helper")
    body = relay.Call(helper, [relay.Call(partition, [relay.nn.conv2d(x, weight, padding=(1, 1))])])
    mod = tvm.IRModule({"main": relay.Function([x], body), helper: function()})
    result, _, plan = sparsify(mod, None, HOST, "spatial")
    assert [layer.reason.split(",")[0] for layer in plan] == [
        "inside a nested function", "asked for", "in function @helper: only @main is rewritten"
    ]  # fmt: skip
    ops = [found.op for found in find_convolutions(result)]
    assert ops == ["nn.conv2d", "jointsparse.conv2d_sparse_direct", "nn.conv2d"]


def test_a_layout_that_stays_dense_is_sparse_after_tvms_own_conversion():
    x, weight = relay.var("x", shape=(1, 10, 12, 4)), relay.var("w", shape=(3, 3, 4, 6))
    body = relay.nn.conv2d(
        x, weight, data_layout="NHWC", kernel_layout="HWIO", kernel_size=(3, 3), channels=6, padding=(1, 1)
    )
    mod = tvm.IRModule.from_expr(relay.Function([x, weight], body))
    value = np.random.default_rng(0).standard_normal((3, 3, 4, 6)).astype("float32")
    result, left, plan = sparsify(mod, {"w": value}, HOST, "spatial")
    assert "layout NHWC" in plan["w"].reason
    x_value = data((1, 10, 12, 4))
    expected = build_and_run(result, left, x_value)
    bound = tvm.IRModule.from_expr(relay.build_module.bind_params_by_name(mod["main"], {"w": value}))
    converted = relay.transform.ConvertLayout({"nn.conv2d": ["NCHW", "OIHW"]})(relay.transform.InferType()(bound))
    result, left, plan = sparsify(converted, None, HOST, "spatial")
    assert kernels(plan) == {"direct"}
    assert relative_rms(build_and_run(result, left, x_value), expected) < TOLERANCE["spatial"]


@pytest.mark.parametrize("target", ["cuda -arch=sm_80", ["llvm", "cuda -arch=sm_80"], {"cpu": "llvm", "gpu": "cuda"}])
def test_targets_that_run_no_sparse_kernels(target):
    mod, params = small()
    plan = sparsify(mod, params, target, "spatial")[2]
    assert "cuda" in plan["conv"].reason


def test_all_weights_zero():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    net[0].weight.data.zero_()
    for domain in SPARSE_DOMAINS:
        check_domain(net, (1, 3, 9, 9), domain)


def test_a_model_without_convolutions():
    body = relay.nn.relu(relay.var("x", shape=(1, 4)))
    result, left, plan = sparsify(tvm.IRModule.from_expr(body), {}, HOST)
    assert (len(plan), left) == (0, {})
    assert "0 of 0 layers" in str(plan)
    assert build_and_run(result, left, data((1, 4))).shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": "frequency"}, "domain must be one of auto, spatial, winograd, dense, got 'frequency'"),
        ({"winograd_sparsity": 1.0}, r"winograd_sparsity must be in \[0, 1\), got 1.0"),
        ({"winograd_sparsity": -0.1}, r"winograd_sparsity must be in \[0, 1\)"),
        ({"tile": 3}, "tile must be one of"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    mod, params = small()
    with pytest.raises(ValueError, match=message):
        sparsify(mod, params, HOST, **options)


def test_something_else_than_a_module_is_refused():
    mod, params = small()
    with pytest.raises(ValueError, match="needs an IRModule, got Function"):
        sparsify(mod["main"], params, HOST)
    with pytest.raises(ValueError, match="needs a module with a function @main"):
        sparsify(tvm.IRModule({"other": mod["main"]}), params, HOST)


def test_the_callers_pass_context_does_not_change_the_result():
    mod, params = import_torch(settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), (1, 3, 9, 9))
    expected = sparsify(mod, params, HOST, "spatial")[0]
    with tvm.transform.PassContext(opt_level=0):
        tvm.ir.assert_structural_equal(sparsify(mod, params, HOST, "spatial")[0], expected)


# --- full size --------------------------------------------------------------------------------------------------------


def onnx_runtime(net, x):
    """What ONNX Runtime makes of the network."""
    onnxruntime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net.eval().float(), (torch.from_numpy(x),), file, dynamo=False, input_names=["x"])
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def worst(result, expected):
    """Largest error relative to the largest output."""
    return np.abs(result - expected).max() / np.abs(expected).max()


def small_resnet18():
    """ResNet-18's stem, first stage and first strided block, on an image of a quarter of the size."""
    return nn.Sequential(*networks.resnet18()[:6], nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("domain", SPARSE_DOMAINS)
@pytest.mark.parametrize(
    ("make", "size"), [(small_resnet18, 56), pytest.param(networks.resnet18, 224, marks=pytest.mark.slow)]
)
def test_resnet18_equals_onnx_runtime(make, size, domain):
    net = prune(settle(make()), 0.8)
    shape = (1, 3, size, size)
    mod, params = import_torch(net, shape)
    x = data(shape)
    result, left, plan = sparsify(mod, params, HOST, domain)
    assert all(layer.sparse for layer in plan)
    assert worst(build_and_run(result, left, x), onnx_runtime(net, x)) < 1e-4
