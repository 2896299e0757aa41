"""Pooling that becomes part of the convolution before it, and pooling that does not."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.passes.absorb_pooling import AbsorbPooling
from jointsparse.passes.pipeline import sparsify
from jointsparse.schedules.constructors import conv2d_sparse_direct, max_pool2d
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.max_pool import PoolGeometry
from tests import reference
from tests.schedules.test_max_pool import pooled

LLVM = tvm.target.Target("llvm")
GEOMETRY = ConvGeometry(1, 2, 140, 12, 3, (3, 3), (1, 1), (1, 1, 1, 1))
POOL = PoolGeometry((3, 3), (2, 2), (1, 1), (70, 6))
WEIGHT = np.random.default_rng(0).standard_normal(GEOMETRY.weight_shape).astype(np.float32)
BIAS = np.array([0.5, -0.5, 0.0], np.float32)


def convolved(x: relay.Expr) -> relay.Expr:
    return relay.nn.bias_add(conv2d_sparse_direct(x, WEIGHT, GEOMETRY, LLVM), relay.const(BIAS))


def with_epilogues(x: relay.Var, body: relay.Expr) -> tvm.IRModule:
    return AbsorbEpilogues()(tvm.IRModule.from_expr(relay.Function([x], body)))


def run(mod: tvm.IRModule, x: np.ndarray) -> list[np.ndarray]:
    with tvm.transform.PassContext(opt_level=3):
        executor = graph_executor.GraphModule(relay.build(mod, LLVM)["default"](tvm.cpu()))
    executor.set_input("x", x)
    executor.run()
    return [executor.get_output(i).numpy() for i in range(executor.get_num_outputs())]


def is_separate(mod: tvm.IRModule) -> bool:
    return "jointsparse.max_pool2d" in mod.astext()


@pytest.fixture
def x() -> relay.Var:
    return relay.var("x", shape=(1, 2, 140, 12))


def image() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, 2, 140, 12)).astype(np.float32)


def test_pooling_becomes_part_of_the_convolution(x: relay.Var, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jointsparse.schedules.pooled_direct._BLOCKS_OF_CHUNK", 1)
    mod = with_epilogues(x, max_pool2d(relay.nn.relu(convolved(x)), GEOMETRY.out_shape, POOL))
    absorbed = AbsorbPooling()(mod)
    assert is_separate(mod)
    assert not is_separate(absorbed)
    want = np.maximum(reference.conv2d(image(), WEIGHT, GEOMETRY) + BIAS[:, None, None], 0)
    for result in (run(mod, image()), run(absorbed, image())):
        assert reference.relative_rms(result[0], pooled(want, POOL)) < 1e-6


def test_a_second_pooling_stays(x: relay.Var, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jointsparse.schedules.pooled_direct._BLOCKS_OF_CHUNK", 1)
    second = PoolGeometry((2, 2), (2, 2), (0, 0), (35, 3))
    once = max_pool2d(convolved(x), GEOMETRY.out_shape, POOL)
    mod = with_epilogues(x, max_pool2d(once, (1, 3, *POOL.out), second))
    absorbed = AbsorbPooling()(mod)
    assert absorbed.astext().count("jointsparse.max_pool2d") == 1
    np.testing.assert_array_equal(run(absorbed, image())[0], run(mod, image())[0])


def test_pooling_stays_where_the_image_is_read_as_well(x: relay.Var, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jointsparse.schedules.pooled_direct._BLOCKS_OF_CHUNK", 1)
    y = convolved(x)
    mod = with_epilogues(x, relay.Tuple([y, max_pool2d(y, GEOMETRY.out_shape, POOL)]))
    assert is_separate(AbsorbPooling()(mod))


def test_pooling_stays_where_nothing_is_gained(x: relay.Var) -> None:
    shape = (1, 3, 24, 12)
    geometry = ConvGeometry(1, 2, 24, 12, 3, (3, 3), (1, 1), (1, 1, 1, 1))
    small = relay.var("x", shape=(1, 2, 24, 12))
    y = conv2d_sparse_direct(small, WEIGHT, geometry, LLVM)
    mod = with_epilogues(small, max_pool2d(y, shape, PoolGeometry((3, 3), (2, 2), (1, 1), (12, 6))))
    assert is_separate(AbsorbPooling()(mod))


def test_an_image_counted_through_is_not_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    """1x1 convolutions see it as one row."""
    monkeypatch.setattr("jointsparse.schedules.pooled_direct._BLOCKS_OF_CHUNK", 0)
    geometry = ConvGeometry(4, 4, 40, 4, 8, (1, 1))
    weight = np.random.default_rng(0).standard_normal(geometry.weight_shape).astype(np.float32)
    x = relay.var("x", shape=(4, 4, 40, 4))
    pool = PoolGeometry((2, 2), (1, 1), (0, 0), (39, 3))
    mod = with_epilogues(x, max_pool2d(conv2d_sparse_direct(x, weight, geometry, LLVM), geometry.out_shape, pool))
    assert is_separate(AbsorbPooling()(mod))


def test_no_residual_is_absorbed_behind_a_pooling(x: relay.Var, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes may run again on their result."""
    monkeypatch.setattr("jointsparse.schedules.pooled_direct._BLOCKS_OF_CHUNK", 1)
    other = relay.var("other", shape=(1, 3, *POOL.out))
    body = relay.add(max_pool2d(convolved(x), GEOMETRY.out_shape, POOL), other)
    mod = AbsorbPooling()(AbsorbEpilogues()(tvm.IRModule.from_expr(relay.Function([x, other], body))))
    assert not is_separate(mod)
    assert "conv2d_sparse_direct_add" not in AbsorbEpilogues()(mod).astext()


def test_the_stem_of_a_resnet_takes_on_its_pooling() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 3, 7, 7)).astype(np.float32)
    weight[np.random.default_rng(1).random(weight.shape) < 0.8] = 0
    x = relay.var("x", shape=(1, 3, 224, 224))
    y = relay.nn.relu(relay.nn.conv2d(x, relay.const(weight), strides=(2, 2), padding=(3, 3), kernel_size=(7, 7)))
    y = relay.nn.max_pool2d(y, (3, 3), (2, 2), padding=(1, 1))
    mod, _, _ = sparsify(tvm.IRModule.from_expr(y), {}, "llvm -mcpu=skylake-avx512", domain="spatial")
    text = mod.astext()
    assert "jointsparse.conv2d_sparse_direct" in text
    assert "max_pool2d" not in text
    assert tuple(mod["main"].ret_type.shape) == (1, 64, 56, 56)
