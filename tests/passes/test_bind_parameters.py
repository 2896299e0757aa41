"""Parameters become constants."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relay

from jointsparse.passes.bind_parameters import BindParameters, convolution_weights

WEIGHT = np.ones((4, 4, 3, 3), "float32")
BIAS = np.ones(4, "float32")


def module():
    x = relay.var("x", shape=(1, 4, 8, 8))
    weight, bias = relay.var("w", shape=(4, 4, 3, 3)), relay.var("b", shape=(4,))
    return tvm.IRModule.from_expr(
        relay.Function([x, weight, bias], relay.nn.bias_add(relay.nn.conv2d(x, weight), bias))
    )


def inputs(mod):
    return [var.name_hint for var in mod["main"].params]


def test_binds_numpy_and_tvm_arrays_and_passes_over_foreign_names():
    mod = module()
    bound = BindParameters({"w": WEIGHT, "b": tvm.nd.array(BIAS), "other": BIAS})(mod)
    assert inputs(bound) == ["x"]
    assert inputs(mod) == ["x", "w", "b"]


def test_weights_of_convolutions_can_stay_named():
    bound = BindParameters({"w": WEIGHT, "b": BIAS}, keep_convolution_weights=True)(module())
    assert inputs(bound) == ["x", "w"]
    assert convolution_weights(bound) == {"w"}


def test_nothing_to_bind_hands_the_module_back():
    mod = module()
    assert BindParameters({"other": BIAS})(mod).same_as(mod)


def test_attributes_of_module_and_function_survive():
    mod = module().with_attr("note", "kept")
    mod["main"] = mod["main"].with_attr("mark", 7)
    bound = BindParameters({"b": BIAS})(mod)
    assert bound.get_attr("note") == "kept"
    assert int(bound["main"].attrs["mark"]) == 7
