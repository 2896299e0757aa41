"""The sparse fully-connected layer against fp64."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.schedules.constructors import dense_sparse, why_not_dense_sparse
from jointsparse.schedules.formats import pack_dense
from jointsparse.schedules.sparse_dense import image_block, nonzero_group, segment_length
from jointsparse.schedules.targets import code_features, cpu_facts
from tests.host import HOST, host_has

# Target, and the features that its code for this layer may use.
TARGETS = {
    "avx512": ("llvm -mcpu=skylake-avx512 -mattr=-fast-gather", ["avx512f", "avx512bw"]),
    "avx512 gather": ("llvm -mcpu=skylake-avx512", ["avx512f", "avx512bw"]),
    "avx2": ("llvm -mcpu=haswell", ["avx2", "fma"]),
    "avx2 gather": ("llvm -mcpu=alderlake", ["avx2", "fma"]),
    "sse": ("llvm", []),
}


@pytest.fixture(params=TARGETS)
def target(request):
    text, needs = TARGETS[request.param]
    if needs and not host_has(*needs):
        pytest.skip(f"this CPU lacks one of {', '.join(needs)}")
    return text


def sparse_matrix(outputs: int, inputs: int, sparsity: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    weight[rng.random(weight.shape) < sparsity] = 0
    return weight


def run(body: relay.Expr, data: np.ndarray, target: str) -> np.ndarray:
    with tvm.transform.PassContext(opt_level=3):
        library = relay.build(tvm.IRModule.from_expr(body), target=target)
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    executor.set_input("x", data)
    executor.run()
    return executor.get_output(0).numpy()


def check(weight: np.ndarray, batch: int, target: str) -> None:
    data = np.random.default_rng(1).standard_normal((batch, weight.shape[1])).astype(np.float32)
    body = dense_sparse(relay.var("x", shape=data.shape), weight, batch, target)
    expected = data.astype(np.float64) @ weight.T.astype(np.float64)
    scale = np.abs(data).astype(np.float64) @ np.abs(weight.T) + 1e-30
    assert np.max(np.abs(run(body, data, target) - expected) / scale) < 1e-6


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 1.0])
def test_equals_fp64(batch, sparsity, target):
    check(sparse_matrix(13, 37, sparsity), batch, target)


def test_many_images_are_done_in_blocks(target):
    """More images than the accumulators hold, and a last block that is not full."""
    check(sparse_matrix(5, 19, 0.5), 150, target)


@pytest.mark.parametrize("batch", [1, 4])
def test_empty_rows(batch, target):
    weight = sparse_matrix(9, 33, 0.6)
    weight[[0, 4, 8]] = 0
    check(weight, batch, target)


@pytest.mark.parametrize(("inputs", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")])
@pytest.mark.parametrize("batch", [1, 2])
def test_indices_take_the_fewest_bytes_that_reach_the_last_input(inputs, dtype, batch):
    weight = sparse_matrix(3, inputs, 0.9)
    weight[:, -1] = 1
    assert pack_dense(weight).indices.dtype == dtype
    for target in (HOST, "llvm"):
        check(weight, batch, target)


def test_a_group_is_filled_with_zeros_for_inputs_of_its_own_row():
    weight = np.zeros((3, 10), np.float32)
    weight[0, [2, 7, 9]] = 1, 2, 3
    weight[2, 4] = 5
    rows = pack_dense(weight, group=4)
    assert rows.indptr.tolist() == [0, 1, 1, 2]
    assert rows.values[:8].tolist() == [1, 2, 3, 0, 5, 0, 0, 0]
    assert rows.indices[:8].tolist() == [2, 7, 9, 9, 4, 4, 4, 4]


@pytest.mark.parametrize("segment", [1, 4, 5, 12, 13])
@pytest.mark.parametrize("group", [1, 4])
def test_segments_hold_their_own_inputs(segment, group):
    weight = sparse_matrix(6, 13, 0.6)
    weight[2] = weight[:, 4] = 0
    rows = pack_dense(weight, group, segment)
    dense = np.zeros_like(weight)
    assert len(rows.indptr) == 1 + 6 * -(-13 // segment)
    for row, (start, end) in enumerate(zip(group * rows.indptr, group * rows.indptr[1:], strict=False)):
        first, k = row // 6 * segment, row % 6
        assert (rows.indices[start:end] < min(segment, 13 - first)).all()
        np.add.at(dense[k], first + rows.indices[start:end].astype(int), rows.values[start:end])
    np.testing.assert_array_equal(dense, weight)


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("outputs", [1, 5, 35])
def test_inputs_beyond_a_segment(sparsity, outputs, target):
    weight = sparse_matrix(outputs, 14_001, sparsity)
    assert segment_length(1, 14_001, cpu_facts(target).l1) < 14_001
    weight[0, :7000] = 0
    check(weight, 1, target)


@given(st.integers(1, 100_000), st.sampled_from([16, 32, 48, 64]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_segments_fit_half_of_l1(inputs, kib):
    segment = segment_length(1, inputs, 1024 * kib)
    assert 4 * segment <= 512 * kib
    segments = -(-inputs // segment)
    assert segments * segment - inputs < segments
    assert segment_length(2, inputs, 1024 * kib) == inputs


@pytest.mark.parametrize("batch", [1, 3])
def test_an_input_that_no_weight_reads_is_not_felt(batch, target):
    weight = sparse_matrix(6, 21, 0.5)
    weight[:, 0] = weight[:, 20] = 0
    data = np.ones((batch, 21), np.float32)
    data[:, 0], data[:, 20] = np.inf, np.nan
    result = run(dense_sparse(relay.var("x", shape=data.shape), weight, batch, target), data, target)
    np.testing.assert_allclose(result, np.tile(weight.sum(1), (batch, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 6])
def test_bias_and_activation_are_part_of_the_kernel(batch, target):
    weight, bias = sparse_matrix(35, 20, 0.6), np.linspace(-1, 1, 35, dtype=np.float32)
    data = np.random.default_rng(2).standard_normal((batch, 20)).astype(np.float32)
    body = relay.nn.bias_add(dense_sparse(relay.var("x", shape=data.shape), weight, batch, target), relay.const(bias))
    mod = tvm.IRModule.from_expr(relay.nn.relu(body))
    with tvm.transform.PassContext(opt_level=3), tvm.target.Target(target):
        fused = relay.transform.FuseOps()(relay.transform.InferType()(mod))
    groups = []
    relay.analysis.post_order_visit(
        fused["main"].body, lambda node: groups.append(node) if isinstance(node, relay.Function) else None
    )
    assert len(groups) == 1
    expected = np.maximum(data.astype(np.float64) @ weight.T.astype(np.float64) + bias, 0)
    np.testing.assert_allclose(run(mod["main"].body, data, target), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
def test_two_threads_give_the_very_same_result(batch, target):
    weight = sparse_matrix(301, 97, 0.8)
    data = np.random.default_rng(3).standard_normal((batch, 97)).astype(np.float32)
    body = dense_sparse(relay.var("x", shape=data.shape), weight, batch, target)
    set_threads = tvm.get_global_func("runtime.config_threadpool")
    results = []
    try:
        for threads in (1, 2):
            set_threads(0, threads)
            results.append(run(body, data, target))
    finally:
        set_threads(0, 0)
    assert np.array_equal(*results)


def test_a_kernel_made_for_one_cpu_is_right_on_another():
    weight = sparse_matrix(7, 30, 0.5)
    for batch in (1, 40):
        data = np.random.default_rng(4).standard_normal((batch, 30)).astype(np.float32)
        made = dense_sparse(relay.var("x", shape=data.shape), weight, batch, "llvm -mcpu=skylake-avx512")
        np.testing.assert_allclose(run(made, data, "llvm"), data @ weight.T, rtol=1e-5, atol=1e-5)


def test_gathers_where_they_are_fast_only():
    weight, data = sparse_matrix(8, 64, 0.5), relay.var("x", shape=(1, 64))
    for cpu, gathers in (("alderlake", True), ("skylake-avx512", True), ("haswell", False), ("znver3", False)):
        text = f"llvm -mtriple=x86_64-linux-gnu -mcpu={cpu}"
        with tvm.transform.PassContext(opt_level=3):
            built = relay.build(tvm.IRModule.from_expr(dense_sparse(data, weight, 1, text)), target=text)
        assert ("vgatherdps" in built.lib.get_source("asm")) == gathers
    assert not code_features("llvm -mtriple=x86_64-linux-gnu -mcpu=alderlake -mattr=-fast-gather").gather
    assert not code_features("llvm -mtriple=aarch64-linux-gnu").gather
    assert not code_features("c").gather


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_images_are_spread_evenly_over_blocks(lanes):
    for batch in range(2, 300):
        block = image_block(batch, lanes)
        blocks = -(-batch // block.images)
        assert block.lanes <= lanes
        assert block.vectors <= 8
        assert blocks * block.images - batch < blocks * block.lanes
        assert 1 <= nonzero_group(batch, lanes) * block.vectors <= 8


def test_what_exceeds_32_bits_is_refused():
    assert why_not_dense_sparse(1, 4096, 4096) is None
    assert "weights of" in why_not_dense_sparse(1, 2**16, 2**15)
    assert "input of" in why_not_dense_sparse(2**20, 2**11, 1)
    with pytest.raises(ValueError, match="exceeds 32-bit offsets"):
        dense_sparse(relay.var("x", shape=(2**24, 128)), np.zeros((1, 128), np.float32), 2**24)


def test_data_of_another_shape_is_refused():
    body = dense_sparse(relay.var("x", shape=(1, 11)), sparse_matrix(3, 10, 0.5), 1)
    with pytest.raises(Exception, match=r"float32 data of shape \(1, 10\)"):
        relay.transform.InferType()(tvm.IRModule.from_expr(body))


@pytest.mark.parametrize("batch", [1, 3])
def test_as_c_source(batch, tmp_path):
    """For what has a C compiler only: no vectors, no gathers, nothing fetched ahead."""
    weight = sparse_matrix(6, 40, 0.5)
    data = np.random.default_rng(5).standard_normal((batch, 40)).astype(np.float32)
    with tvm.transform.PassContext(opt_level=3):
        body = dense_sparse(relay.var("x", shape=data.shape), weight, batch, "c")
        relay.build(tvm.IRModule.from_expr(body), target="c").export_library(tmp_path / "c.so")
    executor = graph_executor.GraphModule(tvm.runtime.load_module(str(tmp_path / "c.so"))["default"](tvm.cpu()))
    executor.set_input("x", data)
    executor.run()
    np.testing.assert_allclose(executor.get_output(0).numpy(), data @ weight.T, rtol=1e-5, atol=1e-5)
