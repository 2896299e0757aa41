"""Every convolution is listed, and what stands against a sparse kernel is said."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relay

from jointsparse.passes.collect_convolutions import CollectConvolutions
from jointsparse.passes.layers import Worklist
from jointsparse.schedules.constructors import dense_sparse
from jointsparse.schedules.geometry import ConvGeometry
from tests.host import HOST

RNG = np.random.default_rng(0)


def weight_of(*shape, dtype="float32"):
    return relay.const(RNG.standard_normal(shape).astype(dtype))


def image(*shape, dtype="float32"):
    return relay.var("x", shape=shape or (1, 4, 8, 8), dtype=dtype)


def module(body):
    return tvm.IRModule.from_expr(relay.Function(relay.analysis.free_vars(body), body))


def collect(mod, params=None, target=HOST):
    worklist = Worklist()
    CollectConvolutions(worklist, params or {}, tvm.target.Target(target))(mod)
    return worklist.layers


def only_layer(body, params=None, target=HOST):
    (layer,) = collect(module(body), params, target)
    return layer


def test_a_plain_convolution_is_described():
    body = relay.nn.conv2d(
        image(2, 4, 8, 9), weight_of(6, 2, 3, 5), strides=(1, 2), padding=(0, 1, 2, 3), dilation=(2, 1), groups=2
    )
    layer = only_layer(body)
    assert layer.left_alone is None
    geometry = layer.geometry
    assert (geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width) == (2, 4, 8, 9)
    assert (geometry.out_channels, geometry.kernel, geometry.groups) == (6, (3, 5), 2)
    assert (geometry.strides, geometry.padding, geometry.dilation) == ((1, 2), (0, 1, 2, 3), (2, 1))
    assert layer.output_shape == geometry.out_shape
    assert "direct" not in layer.unsupported
    assert layer.unsupported.keys() == {"winograd_f2", "winograd_f4"}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: relay.nn.conv2d(image(1, 8, 8, 4), weight_of(3, 3, 4, 6), data_layout="NHWC", kernel_layout="HWIO",
                                 kernel_size=(3, 3), channels=6), "layout NHWC"),
        (lambda: relay.nn.conv2d(image(), weight_of(6, 4, 3, 3), out_layout="NHWC"), "layout NHWC"),
        (lambda: relay.nn.conv2d(image(dtype="int8"), weight_of(6, 4, 3, 3, dtype="int8"), out_dtype="int32"),
         "data type int8"),
        (lambda: relay.nn.conv2d(image(dtype="float16"), weight_of(6, 4, 3, 3, dtype="float16")), "data type float16"),
        (lambda: relay.nn.conv2d(image(), relay.var("w", shape=(6, 4, 3, 3))), "pass it in params"),
        (lambda: relay.nn.conv2d(image(), relay.nn.relu(relay.var("w", shape=(6, 4, 3, 3)))), "computed at run time"),
        (lambda: relay.nn.conv2d(image(relay.Any(), 4, 8, 8), weight_of(6, 4, 3, 3)), "dynamic shape"),
        (lambda: relay.nn.conv2d_transpose(image(), weight_of(4, 6, 3, 3), kernel_size=(3, 3), channels=6),
         "nn.conv2d_transpose"),
        (lambda: relay.nn.conv3d(image(1, 4, 5, 8, 8), weight_of(6, 4, 3, 3, 3)), "nn.conv3d"),
        (lambda: relay.nn.conv1d(image(1, 4, 8), weight_of(6, 4, 3)), "nn.conv1d"),
        (lambda: relay.nn.deformable_conv2d(image(), relay.var("o", shape=(1, 18, 6, 6)), weight_of(6, 4, 3, 3),
                                            kernel_size=(3, 3), channels=6), "nn.deformable_conv2d"),
    ],
)  # fmt: skip
def test_what_no_kernel_does_has_a_reason(make, reason):
    layer = only_layer(make())
    assert reason in layer.left_alone
    assert layer.kernel == "dense"


def test_another_layout_of_the_weights_is_read():
    weight = RNG.standard_normal((3, 5, 4, 6)).astype("float32")
    layer = only_layer(relay.nn.conv2d(image(), relay.const(weight), kernel_layout="HWIO"))
    assert layer.left_alone is None
    assert np.array_equal(layer.weight.value, weight.transpose(3, 2, 0, 1))
    assert layer.geometry.kernel == (3, 5)


def test_depthwise_weights_in_tvms_own_order_are_read():
    """(channels, multiplier): the filter m of channel c makes output c * multiplier + m."""
    weight = RNG.standard_normal((4, 3, 3, 3)).astype("float32")
    scale = np.arange(1, 5, dtype="float32").reshape(4, 1, 1, 1)
    scaled = relay.multiply(relay.var("w", shape=weight.shape), relay.const(scale))
    body = relay.nn.conv2d(image(), scaled, groups=4, channels=12, kernel_size=(3, 3))
    layer = only_layer(body, {"w": weight})
    assert layer.geometry.weight_shape == (12, 1, 3, 3)
    assert np.array_equal(layer.weight.value, (weight * scale).reshape(12, 1, 3, 3))


def test_a_target_without_sparse_kernels_is_named():
    assert "cuda" in only_layer(relay.nn.conv2d(image(), weight_of(6, 4, 3, 3)), target="cuda -arch=sm_80").left_alone


def test_weights_from_parameters_name_the_layer_and_a_shared_one_numbers_it():
    weight = relay.var("body.0.weight", shape=(4, 4, 3, 3))
    body = relay.nn.conv2d(relay.nn.conv2d(image(), weight), weight)
    value = RNG.standard_normal((4, 4, 3, 3)).astype("float32")
    first, second = collect(module(body), {"body.0.weight": tvm.nd.array(value)})
    assert (first.name, second.name) == ("body.0", "body.0#2")
    assert first.weight.parameter == second.weight.parameter == "body.0.weight"
    assert np.array_equal(first.weight.value, value)


def test_what_batch_norm_left_on_a_weight_is_its_scale():
    weight = relay.var("w", shape=(6, 4, 3, 3))
    backward = relay.const(np.arange(1, 7, dtype="float32").reshape(6, 1, 1, 1))
    forward = relay.const(np.arange(1, 5, dtype="float32").reshape(4, 1, 1))
    value = RNG.standard_normal((6, 4, 3, 3)).astype("float32")
    body = relay.nn.conv2d(image(), relay.multiply(forward, relay.multiply(weight, backward)))
    layer = only_layer(body, {"w": value})
    assert np.array_equal(layer.weight.stored, value)
    np.testing.assert_allclose(
        layer.weight.value, value * backward.data.numpy() * forward.data.numpy(), rtol=1e-6, atol=0
    )


def test_of_two_constants_the_larger_is_the_weight():
    weight, scale = weight_of(6, 4, 3, 3), weight_of(6, 1, 1, 1)
    for product in (relay.multiply(weight, scale), relay.multiply(scale, weight)):
        layer = only_layer(relay.nn.conv2d(image(), product))
        assert np.array_equal(layer.weight.stored, weight.data.numpy())
        assert layer.weight.scale.shape[2:] == (1, 1)


@pytest.mark.parametrize("shape", [(1, 4, 3, 3), (4, 3, 3), (6, 1, 1, 1)])
@pytest.mark.parametrize("named", [False, True])
def test_a_weight_that_is_broadcast_is_multiplied_out(shape, named):
    stored, scale = RNG.standard_normal(shape).astype("float32"), weight_of(6, 4, 1, 1)
    weight = relay.var("w", shape=shape) if named else relay.const(stored)
    body = relay.multiply(relay.multiply(weight, scale), weight_of(3, 3))
    layer = only_layer(relay.nn.conv2d(image(), body), {"w": stored})
    assert layer.left_alone is None
    assert layer.weight.stored.shape == layer.geometry.weight_shape == (6, 4, 3, 3)
    np.testing.assert_allclose(
        layer.weight.value, stored * scale.data.numpy() * body.args[1].data.numpy(), rtol=1e-6, atol=0
    )


def test_a_scale_in_another_layout_of_the_weights_is_read():
    weight, scale = weight_of(3, 5, 4, 6), weight_of(6)
    layer = only_layer(relay.nn.conv2d(image(), relay.multiply(scale, weight), kernel_layout="HWIO"))
    product = weight.data.numpy() * scale.data.numpy()
    np.testing.assert_allclose(layer.weight.value, product.transpose(3, 2, 0, 1), rtol=1e-6, atol=0)


def test_a_weight_of_dynamic_shape_is_left_alone():
    weight = relay.var("w", shape=(relay.Any(), 4, 3, 3))
    body = relay.nn.conv2d(image(), weight, channels=6, kernel_size=(3, 3))
    layer = only_layer(body, {"w": np.zeros((6, 4, 3, 3), "float32")})
    assert "dynamic shape" in layer.left_alone


def test_a_parameter_of_another_shape_is_refused():
    body = relay.nn.conv2d(image(), relay.var("w", shape=(6, 4, 3, 3)))
    with pytest.raises(ValueError, match=r"params\['w'\] has shape \(6, 4, 1, 1\)"):
        only_layer(body, {"w": np.zeros((6, 4, 1, 1), "float32")})


def test_zero_weights_are_counted():
    weight = np.zeros((6, 4, 3, 3), "float32")
    weight[:3] = 1
    assert only_layer(relay.nn.conv2d(image(), relay.const(weight))).spatial_sparsity == 0.5


def test_convolutions_in_nested_and_other_functions_are_listed_and_left_alone():
    inner_data = relay.var("d", shape=(1, 4, 8, 8))
    inner = relay.Function([inner_data], relay.nn.conv2d(inner_data, weight_of(4, 4, 1, 1)))
    partition = inner.with_attr("Compiler", "dnnl").with_attr("Primitive", 1)
    x = image()
    body = relay.nn.conv2d(relay.Call(partition, [x]), weight_of(4, 4, 3, 3))
    mod = tvm.IRModule(
        {"main": relay.Function([x], body), "zz": inner, "external": inner.with_attr("Compiler", "dnnl")}
    )
    in_partition, in_main, in_external, in_zz = collect(mod)
    assert in_partition.left_alone == "inside a nested function"
    assert in_main.left_alone is None
    assert in_zz.left_alone == "in function @zz: only @main is rewritten"
    assert in_external.left_alone == "function @external is compiled by dnnl"


def test_the_worklist_is_emptied_first():
    mod = module(relay.nn.conv2d(image(), weight_of(6, 4, 3, 3)))
    worklist = Worklist(warnings=["of another module"])
    for _ in range(2):
        CollectConvolutions(worklist, {}, tvm.target.Target(HOST))(mod)
        assert len(worklist.layers) == 1
        assert worklist.warnings == []


# --- fully-connected layers -------------------------------------------------------------------------------------------


def matrix(*shape):
    return relay.var("x", shape=shape)


def test_a_fully_connected_layer_is_a_convolution_of_one_pixel():
    weight = RNG.standard_normal((6, 4)).astype("float32")
    weight[:3] = 0
    layer = only_layer(relay.nn.dense(matrix(2, 4), relay.const(weight)))
    assert layer.left_alone is None
    assert layer.geometry == ConvGeometry(2, 4, 1, 1, 6, (1, 1))
    assert (layer.input_shape, layer.weight_shape, layer.output_shape) == ((2, 4), (6, 4), (2, 6))
    assert np.array_equal(layer.weight.value, weight.reshape(6, 4, 1, 1))
    assert layer.spatial_sparsity == 0.5
    reason = "a fully-connected layer is outside Winograd's reach"
    assert layer.unsupported == {"winograd_f2": reason, "winograd_f4": reason}


def test_all_axes_but_the_last_are_the_batch():
    layer = only_layer(relay.nn.dense(matrix(2, 3, 4), weight_of(6, 4)))
    assert (layer.geometry.batch, layer.geometry.in_channels, layer.geometry.out_channels) == (6, 4, 6)


@pytest.mark.parametrize("axes", [None, (1, 0)])
def test_a_transposed_parameter_names_the_layer(axes):
    stored = RNG.standard_normal((4, 6)).astype("float32")
    scale = RNG.standard_normal((6, 1)).astype("float32")
    transposed = relay.transpose(relay.var("head.weight", shape=(4, 6)), axes)
    mod = module(relay.nn.dense(matrix(1, 4), relay.multiply(transposed, relay.const(scale))))
    (layer,) = collect(mod, {"head.weight": stored})
    assert (layer.name, layer.weight.parameter) == ("head", "head.weight")
    np.testing.assert_allclose(layer.weight.value[:, :, 0, 0], stored.T * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: relay.nn.dense(relay.var("x", shape=(1, 4), dtype="float16"), weight_of(6, 4, dtype="float16")),
         "data type float16"),
        (lambda: relay.nn.dense(relay.var("x", shape=(1, 4), dtype="int8"), weight_of(6, 4, dtype="int8"),
                                out_dtype="int32"), "data type int8"),
        (lambda: relay.nn.dense(matrix(1, 4), relay.var("w", shape=(6, 4))), "pass it in params"),
        (lambda: relay.nn.dense(matrix(1, 4), relay.nn.relu(relay.var("w", shape=(6, 4)))), "computed at run time"),
        (lambda: relay.nn.dense(matrix(relay.Any(), 4), weight_of(6, 4)), "dynamic shape"),
        (lambda: relay.nn.matmul(matrix(1, 4), weight_of(4, 6)), "nn.matmul"),
        (lambda: relay.nn.contrib_dense_pack(matrix(1, 4), weight_of(1, 4, 8), "NC8n"), "nn.contrib_dense_pack"),
        (lambda: dense_sparse(matrix(1, 4), np.ones((6, 4), "float32"), 1), "sparse already"),
    ],
)  # fmt: skip
def test_a_fully_connected_layer_left_alone_has_a_reason(make, reason):
    assert reason in only_layer(make()).left_alone


def test_a_fully_connected_layer_too_large_is_left_alone():
    layer = only_layer(relay.nn.dense(matrix(2**26, 64), weight_of(1, 64)))
    assert "input of 4294967296 elements" in layer.left_alone
