"""The sparse fully-connected layer against fp64."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.schedules.formats import pack_dense
from jointsparse.schedules.operators import dense_sparse, why_not_dense_sparse
from jointsparse.schedules.sparse_dense import image_block, nonzero_group
from jointsparse.schedules.targets import gathers_fast

# Target, and the features that its code for this layer may use.
TARGETS = {
    "avx512": ("llvm -mcpu=skylake-avx512", ["avx512f", "avx512bw"]),
    "avx512 gather": ("llvm -mcpu=sapphirerapids", ["avx512f", "avx512bw"]),
    "avx2": ("llvm -mcpu=haswell", ["avx2", "fma"]),
    "avx2 gather": ("llvm -mcpu=alderlake", ["avx2", "fma"]),
    "sse": ("llvm", []),
}


HOST = tvm.target.Target(f"llvm -mcpu={tvm.target.codegen.llvm_get_system_cpu()}")


@pytest.fixture(params=TARGETS)
def target(request):
    text, needs = TARGETS[request.param]
    if needs and not tvm.target.codegen.target_has_features(needs, HOST):
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
