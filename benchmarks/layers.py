"""Single layers on one thread: dense TVM, ONNX Runtime, sparse direct, sparse Winograd.

    python benchmarks/layers.py [--sparsity 0.8 0.9] [--target "llvm -mcpu=..."] [--only NAME ...] [--json]

Every layer has bias and ReLU. Milliseconds are the least processor time of many runs, so that other programs on the
machine disturb little. "G/s" is useful work: multiplications by non-zeros, 1e9 a second. Sparse weights are random,
pruned in the domain in which they are used: by magnitude, for Winograd weighted by what it changes of the output.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ["TVM_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import onnxruntime
import tvm
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.schedules.constructors import conv2d_sparse_direct, conv2d_sparse_winograd, why_not_winograd
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.winograd_pruning import WinogradPruning, magnitudes, separating_threshold


def layer(
    channels: int, filters: int, height: int, width: int, size: int, stride: int = 1, padding: int | None = None
) -> ConvGeometry:
    p = size // 2 if padding is None else padding
    return ConvGeometry(1, channels, height, width, filters, (size, size), (stride, stride), (p, p, p, p))


LAYERS = {
    "64, 56x56": layer(64, 64, 56, 56, 3),
    "128, 28x28": layer(128, 128, 28, 28, 3),
    "256, 14x14": layer(256, 256, 14, 14, 3),
    "512, 7x7": layer(512, 512, 7, 7, 3),
    "64, 256x256": layer(64, 64, 256, 256, 3),
    "32, 720x1280": layer(32, 32, 720, 1280, 3),
    "64-128, 56x56, stride 2": layer(64, 128, 56, 56, 3, 2),
    "1x1 64, 56x56": layer(64, 64, 56, 56, 1),
    "7x7 3-64, 224x224, stride 2": layer(3, 64, 224, 224, 7, 2),
    "9x9 1-64, 720x1280": layer(1, 64, 720, 1280, 9),
}

SECONDS = 0.5
"""Time spent on one measurement, at least ten runs."""


@dataclass(frozen=True)
class Row:
    layer: str
    engine: str
    sparsity: float
    milliseconds: float
    useful_gmacs: float


def fastest(run: Callable[[], object]) -> float:
    """Least processor seconds of a run; all engines compute in the calling thread."""
    run()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 10 or time.perf_counter() < end:
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times)


def prune(weight: NDArray[np.float64], sparsity: float) -> NDArray[np.float32]:
    kept = np.abs(weight) > np.quantile(np.abs(weight), sparsity)
    return (weight * kept).astype(np.float32)


def prune_winograd(weight: NDArray[np.float64], m: int, sparsity: float) -> NDArray[np.float32]:
    """Winograd weights, pruned as `sparsify` does."""
    threshold = separating_threshold(magnitudes(weight, m, weighted=True), sparsity)
    return WinogradPruning(m, threshold, weighted=True).filters(weight).astype(np.float32)


def tvm_seconds(
    geometry: ConvGeometry, convolution: Callable[[relay.Expr], relay.Expr], target: str, data: NDArray[np.float32]
) -> float:
    x = relay.var("x", shape=data.shape)
    bias = relay.const(np.ones(geometry.out_channels, np.float32))
    y = relay.nn.relu(relay.nn.bias_add(convolution(x), bias))
    with tvm.transform.PassContext(opt_level=3):
        library = relay.build(tvm.IRModule.from_expr(relay.Function([x], y)), target)
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    executor.set_input("x", data)
    return fastest(executor.module["run"])


def onnxruntime_seconds(geometry: ConvGeometry, weight: NDArray[np.float32], data: NDArray[np.float32]) -> float:
    attributes: dict[str, Any] = {
        "pads": geometry.padding,
        "strides": geometry.strides,
        "kernel_shape": geometry.kernel,
    }
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w", "b"], ["c"], **attributes), helper.make_node("Relu", ["c"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, data.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, geometry.out_shape)],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.ones(geometry.out_channels, np.float32), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return fastest(lambda: session.run(None, {"x": data}))


def measure(name: str, sparsities: list[float], target: str) -> list[Row]:
    geometry = LAYERS[name]
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(geometry.weight_shape)
    shape = (geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width)
    data = rng.standard_normal(shape).astype(np.float32)
    dense_weight = weight.astype(np.float32)

    def row(engine: str, sparsity: float, seconds: float, macs: float) -> Row:
        return Row(name, engine, sparsity, seconds * 1e3, macs / seconds / 1e9)

    def dense(x: relay.Expr) -> relay.Expr:
        return relay.nn.conv2d(
            x,
            relay.const(dense_weight),
            channels=geometry.out_channels,
            kernel_size=geometry.kernel,
            padding=geometry.padding,
            strides=geometry.strides,
        )

    rows = [
        row("dense ONNX Runtime", 0, onnxruntime_seconds(geometry, dense_weight, data), geometry.macs),
        row("dense TVM", 0, tvm_seconds(geometry, dense, target, data), geometry.macs),
    ]
    for sparsity in sparsities:
        spatial = prune(weight, sparsity)
        direct = partial(conv2d_sparse_direct, weight=spatial, geometry=geometry, target=target)
        seconds = tvm_seconds(geometry, direct, target, data)
        pixels = geometry.out_height * geometry.out_width
        rows.append(row("direct", sparsity, seconds, int(np.count_nonzero(spatial)) * pixels))
        for m in (2, 4):
            if why_not_winograd(geometry, m, target):
                continue
            pruned = prune_winograd(weight, m, sparsity)
            winograd = partial(conv2d_sparse_winograd, winograd_weight=pruned, geometry=geometry, m=m, target=target)
            seconds = tvm_seconds(geometry, winograd, target, data)
            tiles = -(-geometry.out_height // m) * -(-geometry.out_width // m)
            rows.append(row(f"Winograd F({m}x{m})", sparsity, seconds, int(np.count_nonzero(pruned)) * tiles))
    return rows


def show(rows: list[Row]) -> None:
    table = Table("layer", "engine", "zeros", "ms", "G/s", title="one thread, least processor time of many runs")
    for entry in rows:
        zeros = f"{entry.sparsity:.0%}" if entry.sparsity else ""
        table.add_row(entry.layer, entry.engine, zeros, f"{entry.milliseconds:.3f}", f"{entry.useful_gmacs:.1f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--target", default=f"llvm -mcpu={tvm.target.codegen.llvm_get_system_cpu()}")
    parser.add_argument("--only", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [row for name in arguments.only for row in measure(name, arguments.sparsity, arguments.target)]
    if arguments.json:
        print(json.dumps([vars(row) for row in rows], indent=1))
    else:
        show(rows)


if __name__ == "__main__":
    main()
