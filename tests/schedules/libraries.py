"""Modules of one small convolution, for the tests of the operators: built, run, and what they should give."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.schedules.constructors import conv2d_sparse_direct, conv2d_sparse_winograd
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.winograd import transform
from tests import reference

LLVM = "llvm"
SMALL = ConvGeometry(1, 4, 11, 13, 6, (3, 3), padding=(1, 1, 1, 1))
BOTH = pytest.mark.parametrize("tile", [0, 4], ids=["direct", "winograd"])
"""0 is direct."""


def weights(geometry: ConvGeometry, tile: int = 0, sparsity: float = 0.8, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal(geometry.weight_shape)
    dense = transform(tile, geometry.kernel[0]).filters(dense) if tile else dense
    dense.reshape(-1)[rng.permutation(dense.size)[: round(sparsity * dense.size)]] = 0
    return dense.astype(np.float32)


def data_of(geometry: ConvGeometry) -> NDArray[np.float32]:
    shape = (geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def sparse(
    data: relay.Expr, weight: NDArray[np.float32], geometry: ConvGeometry, tile: int, target: str = LLVM
) -> relay.Expr:
    if tile:
        return conv2d_sparse_winograd(data, weight, geometry, tile, target)
    return conv2d_sparse_direct(data, weight, geometry, target)


def expected(data: NDArray[np.float32], weight: NDArray[np.float32], geometry: ConvGeometry, tile: int) -> NDArray:
    if tile:
        return reference.winograd(data, weight, geometry, tile)
    return reference.conv2d(data, weight, geometry)


def module(geometry: ConvGeometry, after: Callable[[relay.Expr], relay.Expr], tile: int = 0) -> tvm.IRModule:
    x = relay.var("x", shape=data_of(geometry).shape)
    return tvm.IRModule.from_expr(relay.Function([x], after(sparse(x, weights(geometry, tile), geometry, tile))))


def build(mod: tvm.IRModule, target: str = LLVM, opt_level: int = 3) -> tvm.relay.backend.executor_factory:
    with tvm.transform.PassContext(opt_level=opt_level):
        return relay.build(mod, target)


def run(library: tvm.runtime.Module, **inputs: NDArray) -> NDArray:
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    executor.set_input(**inputs)
    executor.run()
    return executor.get_output(0).numpy()


def close(result: NDArray, reference_result: NDArray) -> None:
    assert result.shape == reference_result.shape
    assert reference.relative_rms(result, reference_result) < 1e-5


def check_plain(geometry: ConvGeometry, tile: int = 0, target: str = LLVM, sparsity: float = 0.8) -> None:
    weight, data = weights(geometry, tile, sparsity), data_of(geometry)
    x = relay.var("x", shape=data.shape)
    mod = tvm.IRModule.from_expr(relay.Function([x], sparse(x, weight, geometry, tile, target)))
    close(run(build(mod, target), x=data), expected(data, weight, geometry, tile))


def kernels(library: tvm.runtime.Module) -> list[str]:
    return [
        node["attrs"]["func_name"] for node in json.loads(library.get_graph_json())["nodes"] if node["op"] != "null"
    ]
