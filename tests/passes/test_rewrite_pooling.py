"""Max pooling by our operator equals TVM's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.passes.rewrite_pooling import RewritePooling

LLVM = tvm.target.Target("llvm")


def pooling(shape: tuple[int, ...], dtype: str = "float32", **options: object) -> tvm.IRModule:
    x = relay.var("x", shape=shape, dtype=dtype)
    return relay.transform.InferType()(tvm.IRModule.from_expr(relay.nn.max_pool2d(x, **options)))


def is_ours(mod: tvm.IRModule) -> bool:
    return "jointsparse.max_pool2d" in mod.astext()


def run(mod: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    with tvm.transform.PassContext(opt_level=3):
        library = relay.build(mod, LLVM)
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    executor.set_input("x", x)
    executor.run()
    return executor.get_output(0).numpy()


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    pool=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    batch=st.integers(1, 2),
    channels=st.integers(1, 5),
    ceil_mode=st.booleans(),
)
def test_equals_tvms(
    pool: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    size: tuple[int, int],
    batch: int,
    channels: int,
    ceil_mode: bool,
) -> None:
    size = (max(size[0], pool[0] - padding[0] - padding[2]), max(size[1], pool[1] - padding[1] - padding[3]))
    x = np.random.default_rng(0).standard_normal((batch, channels, *size)).astype(np.float32)
    mod = pooling(x.shape, pool_size=pool, strides=strides, padding=padding, ceil_mode=ceil_mode)
    ours = RewritePooling(LLVM)(mod)
    assert is_ours(ours)
    np.testing.assert_array_equal(run(ours, x), run(mod, x))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 2, 8, 8), {"dtype": "float16"}),
        ((1, 8, 8, 2), {"layout": "NHWC"}),
        ((1, 2, 8, 8), {"dilation": (2, 2)}),
        ((1, 2, relay.Any(), 8), {}),
    ],
    ids=["data type", "layout", "dilation", "dynamic"],
)
def test_the_rest_is_left_alone(shape: tuple, options: dict) -> None:
    mod = pooling(shape, **{"pool_size": (3, 3), "strides": (1, 1), **options})
    assert tvm.ir.structural_equal(RewritePooling(LLVM)(mod), mod)


def test_other_targets_are_left_alone() -> None:
    mod = pooling((1, 2, 8, 8), pool_size=(3, 3))
    assert not is_ours(RewritePooling(tvm.target.Target("opencl"))(mod))
