"""Only what was chosen is rewritten."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relay

from jointsparse.passes.collect_convolutions import CollectConvolutions
from jointsparse.passes.convolutions import find_convolutions
from jointsparse.passes.layers import Worklist
from jointsparse.passes.prune_winograd import PruneWinograd
from jointsparse.passes.rewrite_convolutions import RewriteConvolutions
from tests.host import HOST
from tests.passes.relay_nets import build_and_run

RNG = np.random.default_rng(0)
TARGET = tvm.target.Target(HOST)


def convolution(x):
    return relay.nn.conv2d(x, relay.const(RNG.standard_normal((4, 4, 3, 3)).astype("float32")), padding=(1, 1))


def collected(mod):
    worklist = Worklist()
    mod = PruneWinograd(worklist)(CollectConvolutions(worklist, {}, TARGET)(mod))
    return worklist, mod


def operators(mod):
    return [found.op for found in find_convolutions(mod)]


def test_each_layer_becomes_the_operator_chosen():
    x = relay.var("x", shape=(1, 4, 8, 8))
    body = convolution(relay.nn.relu(convolution(convolution(x))))
    worklist, mod = collected(tvm.IRModule.from_expr(body).with_attr("note", "kept"))
    worklist.layers[0].kernel = "direct"
    worklist.layers[2].kernel = "winograd_f2"
    result = RewriteConvolutions(worklist, TARGET)(mod)
    assert operators(result) == [
        "jointsparse.conv2d_sparse_direct", "nn.conv2d", "jointsparse.conv2d_sparse_winograd"
    ]  # fmt: skip
    assert operators(mod) == ["nn.conv2d"] * 3
    assert result.get_attr("note") == "kept"
    tvm.ir.assert_structural_equal(result["main"].checked_type, relay.transform.InferType()(mod)["main"].checked_type)


def test_nothing_chosen_hands_the_module_back():
    worklist, mod = collected(tvm.IRModule.from_expr(convolution(relay.var("x", shape=(1, 4, 8, 8)))))
    assert RewriteConvolutions(worklist, TARGET)(mod).same_as(mod)


@pytest.mark.parametrize(
    "other",
    [lambda x: convolution(convolution(x)), convolution, lambda x: x],
    ids=["more operators", "equal operators, other weights", "no operator"],
)
def test_a_worklist_of_another_module_is_refused(other):
    x = relay.var("x", shape=(1, 4, 8, 8))
    worklist, _ = collected(tvm.IRModule.from_expr(convolution(x)))
    worklist.layers[0].kernel = "direct"
    _, mod = collected(tvm.IRModule.from_expr(relay.Function([x], other(x))))
    with pytest.raises(ValueError, match="another module"):
        RewriteConvolutions(worklist, TARGET)(mod)


def test_depth_is_no_limit():
    body = relay.var("x", shape=(1, 4, 8, 8))
    convolutions = 600
    for _ in range(convolutions):
        body = relay.nn.relu(convolution(body))
    worklist, mod = collected(tvm.IRModule.from_expr(body))
    for layer in worklist.layers:
        layer.kernel = "direct"
    assert set(operators(RewriteConvolutions(worklist, TARGET)(mod))) == {"jointsparse.conv2d_sparse_direct"}


def test_branches_that_share_a_convolution_still_share_it():
    shared = convolution(relay.var("x", shape=(1, 4, 8, 8)))
    body = relay.add(relay.nn.relu(shared), relay.tanh(shared))
    worklist, mod = collected(tvm.IRModule.from_expr(body))
    worklist.layers[0].kernel = "direct"
    assert len(operators(RewriteConvolutions(worklist, TARGET)(mod))) == 1


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_a_fully_connected_layer_is_rewritten_whatever_the_shape_of_its_batch(shape):
    weight = relay.const(RNG.standard_normal((6, 4)).astype("float32"))
    worklist, mod = collected(tvm.IRModule.from_expr(relay.nn.dense(relay.var("x", shape=shape), weight)))
    worklist.layers[0].kernel = "direct"
    result = RewriteConvolutions(worklist, TARGET)(mod)
    assert operators(result) == ["jointsparse.dense_sparse"]
    assert [int(size) for size in result["main"].ret_type.shape] == [*shape[:-1], 6]
    x = RNG.standard_normal(shape).astype("float32")
    np.testing.assert_allclose(build_and_run(result, {}, x), x @ weight.data.numpy().T, rtol=1e-5, atol=1e-5)


def test_a_convolution_of_one_pixel_is_a_fully_connected_layer():
    weight = RNG.standard_normal((6, 4, 1, 1)).astype("float32")
    body = relay.nn.conv2d(relay.var("x", shape=(2, 4, 1, 1)), relay.const(weight))
    worklist, mod = collected(tvm.IRModule.from_expr(body))
    worklist.layers[0].kernel = "direct"
    result = RewriteConvolutions(worklist, TARGET)(mod)
    assert operators(result) == ["jointsparse.dense_sparse"]
    x = RNG.standard_normal((2, 4, 1, 1)).astype("float32")
    expected = np.einsum("ncij,kcij->nkij", x, weight)
    np.testing.assert_allclose(build_and_run(result, {}, x), expected, rtol=1e-5, atol=1e-5)
