"""A package operator by operator: where its time goes."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ...passes.plan import DENSE, DIRECT, TILE
from .tvm_build import open_package

MIN_RUNS = 5
_PREFIX = "tvmgen_default_"


@dataclass(frozen=True)
class Operator:
    """One fused operator.

    Attributes:
        name: TVM's. layer: of the plan, empty where it is none of its layers or could not be told.
        ms: the least of all runs.
        multiply_adds: real ones of one run, by non-zero weights if the kernel is sparse (Winograd transforms not
            counted); None where unknown.
    """

    name: str
    layer: str
    ms: float
    multiply_adds: int | None

    @property
    def rate(self) -> float | None:
        """1e9 multiply-adds a second."""
        return None if self.multiply_adds is None else self.multiply_adds / self.ms / 1e6


def measure(
    package: Path, inputs: Mapping[str, Any], plan: Sequence[Mapping[str, Any]], seconds: float
) -> list[Operator]:
    """Time every operator of a package for so many seconds, one after the other as in a run, so that caches are as
    they are in a run.

    Args:
        plan: the convolutions of the package, as in ``Plan.to_json``.
    """
    import tvm
    from tvm.contrib.debugger import debug_executor

    text, library, parameters = open_package(package)
    graph = _Graph(json.loads(text), frozenset(tvm.runtime.load_param_dict(parameters)))
    with tempfile.TemporaryDirectory() as folder:
        executor = debug_executor.create(text, library, tvm.cpu(), dump_root=folder)
        executor.load_params(parameters)
        for name, value in inputs.items():
            executor.set_input(name, value)
        least = _least(executor.module["execute_node"], graph.operators, seconds)
        executor.exit()
    layers = _layers(graph, plan)
    return [
        Operator(
            graph.name(node).removeprefix(_PREFIX),
            str(layers[node]["name"]) if node in layers else "",
            least[node],
            layers[node]["multiplications"] if node in layers else _dense_work(graph, node),
        )
        for node in graph.operators
    ]


@dataclass(frozen=True)
class _Graph:
    """TVM's description of a graph. Nodes are known by their place in it.

    Attributes:
        json: the description. parameters: names of the nodes that hold weights.
    """

    json: Mapping[str, Any]
    parameters: frozenset[str]

    @property
    def operators(self) -> list[int]:
        """Nodes that compute something, in the order in which they run."""
        nodes = self.json["nodes"]
        return [i for i, node in enumerate(nodes) if node["op"] != "null" and self.name(i) != "__nop"]

    def name(self, node: int) -> str:
        """Of the compiled function."""
        described = self.json["nodes"][node]
        return described.get("attrs", {}).get("func_name", described["name"])

    def shape(self, node: int, output: int = 0) -> list[int]:
        """Of one of its outputs."""
        return self.json["attrs"]["shape"][1][self.json["node_row_ptr"][node] + output]

    def size(self, node: int, output: int = 0) -> int:
        """Elements of one of its outputs."""
        return math.prod(self.shape(node, output))

    def inputs(self, node: int) -> list[tuple[str, int]]:
        """Name and elements of each of its inputs."""
        sources = self.json["nodes"][node]["inputs"]
        return [(self.json["nodes"][source]["name"], self.size(source, output)) for source, output, *_ in sources]


def _least(execute: Any, operators: Sequence[int], seconds: float) -> dict[int, float]:
    """Milliseconds by node."""
    least = dict.fromkeys(operators, math.inf)
    runs, end = 0, perf_counter() + seconds
    while runs < MIN_RUNS or perf_counter() < end:
        for node in operators:
            start = perf_counter()
            execute(node)
            least[node] = min(least[node], 1e3 * (perf_counter() - start))
        runs += 1
    return least


def _layers(graph: _Graph, plan: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The layer of the plan that each node runs: the best fit of kernels and sizes, then of places in the order.

    The order alone would not do: TVM runs branches in another one. Where numbers differ (a convolution folded away, or
    several in one operator) nothing is said rather than something wrong.
    """
    convolutions = [node for node in graph.operators if _is_layer(graph.name(node))]
    if len(convolutions) != len(plan) or any(layer["weight_shape"] is None for layer in plan):
        return {}
    misfits = np.zeros((len(plan), len(plan)))
    for row, node in enumerate(convolutions):
        for column, layer in enumerate(plan):
            pairs = zip(_seen(graph, node), _expected(layer), strict=True)
            sizes = sum(abs(math.log(seen / expected)) for seen, expected in pairs)
            other_kernel = _kernel(graph.name(node)) != layer["kernel"].partition("_")[0]
            misfits[row, column] = 100 * other_kernel + sizes + 1e-3 * abs(row - column)
    rows, columns = linear_sum_assignment(misfits)
    return {convolutions[row]: plan[column] for row, column in zip(rows, columns, strict=True)}


def _is_layer(name: str) -> bool:
    """Whether an operator holds a convolution or a fully-connected layer, by its name."""
    return "conv" in name or _is_fully_connected(name)


def _is_fully_connected(name: str) -> bool:
    return "dense" in name or "matmul" in name


def _kernel(name: str) -> str:
    if "dense_sparse" in name:
        return DIRECT
    kinds = (kind for kind in (DIRECT, "winograd") if f"sparse_{kind}" in name)
    return next(kinds, DENSE)


def _seen(graph: _Graph, node: int) -> tuple[int, int, int]:
    """Elements of an operator's output, of its data, and of its largest parameter: the weights."""
    data = [size for name, size in graph.inputs(node) if name not in graph.parameters]
    parameters = [size for name, size in graph.inputs(node) if name in graph.parameters]
    return graph.size(node), data[0] if data else 1, max(parameters, default=1)


def _expected(layer: Mapping[str, Any]) -> tuple[int, int, float]:
    """The same of a convolution, non-zero weights for parameters."""
    filters, channels, *kernel = layer["weight_shape"]
    zeros = layer["spatial_sparsity"] if layer["kernel"] == DIRECT else 0.0
    if layer["kernel"] in TILE:
        kernel = [TILE[layer["kernel"]] + size - 1 for size in kernel]
        zeros = layer["winograd_sparsity"][layer["kernel"]]
    weights = filters * channels * math.prod(kernel)
    return math.prod(layer["output_shape"]), math.prod(layer["input_shape"]), max(1.0, weights * (1 - (zeros or 0.0)))


def _dense_work(graph: _Graph, node: int) -> int | None:
    """Multiply-adds of a dense fully-connected layer that no plan speaks of: its weights, the largest of its inputs,
    once for each row of data."""
    name = graph.name(node)
    if not _is_fully_connected(name) or _kernel(name) != DENSE:
        return None
    return max(size for _, size in graph.inputs(node)) * graph.shape(node)[0]
