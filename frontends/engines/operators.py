"""A package operator by operator: where its time goes."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ...passes.plan import DENSE, DIRECT, TILE
from .tvm_build import open_package

MIN_RUNS = 5
_PREFIX = "tvmgen_default_"
_CHAIN = "winograd_chain"  # in the name of an operator that holds several layers
_BIAS = 4  # which of its parameters has a number for each filter

_Layers = Sequence[Mapping[str, Any]]
"""Of the plan, one after the other."""


@dataclass(frozen=True)
class Operator:
    """One fused operator.

    Attributes:
        name: TVM's. layer: of the plan, ``first..last`` where there are several; empty where it is none of its layers
            or could not be told.
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
            _name(layers.get(node, ())),
            least[node],
            _work(layers[node]) if node in layers else _dense_work(graph, node),
        )
        for node in graph.operators
    ]


def _name(layers: _Layers) -> str:
    """Of several the first and the last."""
    names = [str(layer["name"]) for layer in layers]
    return "..".join(names if len(names) < 2 else (names[0], names[-1]))


def _work(layers: _Layers) -> int | None:
    """Multiply-adds, None if unknown."""
    work = [layer["multiplications"] for layer in layers]
    return None if None in work else sum(work)


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


def _layers(graph: _Graph, plan: _Layers) -> dict[int, _Layers]:
    """The layers of the plan that each node runs, more than one in a chain: the best fit of kernels and sizes, then of
    places in the order.

    The order alone would not do: TVM runs branches in another one. Where numbers differ (a convolution folded away, or
    several in one operator) nothing is said rather than something wrong.
    """
    if any(layer["weight_shape"] is None for layer in plan):
        return {}
    chains = [node for node in graph.operators if _CHAIN in graph.name(node)]
    convolutions = [node for node in graph.operators if _is_layer(graph.name(node)) and node not in chains]
    runs = _runs(graph, chains, convolutions, plan) if chains else []
    rest = [place for place in range(len(plan)) if not any(place in run for run in runs)]
    if len(runs) != len(chains) or len(convolutions) != len(rest):
        return {}
    misfits = np.zeros((len(rest), len(rest)))
    for row, node in enumerate(convolutions):
        for column, place in enumerate(rest):
            misfits[row, column] = _misfit(graph, node, [plan[place]]) + 1e-3 * abs(row - column)
    rows, columns = linear_sum_assignment(misfits)
    found: dict[int, _Layers] = {node: plan[run.start : run.stop] for node, run in zip(chains, runs, strict=True)}
    return found | {convolutions[row]: [plan[rest[column]]] for row, column in zip(rows, columns, strict=True)}


def _runs(graph: _Graph, chains: Sequence[int], convolutions: Sequence[int], plan: _Layers) -> Sequence[range]:
    """For each chain, layers that follow each other, as many filters in all as it has, so that one is left for each of
    the convolutions: the best fit, with chains in the order of the plan. None if there is no such."""
    filters = [0, *accumulate(layer["weight_shape"][0] for layer in plan)]
    biases = [_parameters(graph, node)[_BIAS] for node in chains]
    left = [min((_misfit(graph, node, [layer]) for node in convolutions), default=math.inf) for layer in plan]

    @cache
    def best(start: int, chain: int) -> tuple[float, tuple[range, ...]]:
        """Of the layers from one on, and the chains from one on."""
        if start == len(plan):
            return 0.0 if chain == len(chains) else math.inf, ()
        cost, runs = best(start + 1, chain)
        options = [(cost + left[start], runs)]
        for stop in range(start + 1, len(plan) + 1) if chain < len(chains) else ():
            if filters[stop] - filters[start] == biases[chain]:
                cost, runs = best(stop, chain + 1)
                cost += _misfit(graph, chains[chain], plan[start:stop])
                options.append((cost, (range(start, stop), *runs)))
        return min(options, key=lambda option: option[0])

    return best(0, 0)[1]


def _misfit(graph: _Graph, node: int, layers: _Layers) -> float:
    """How unlike its kernel and sizes are those of layers one after the other."""
    pairs = zip(_seen(graph, node), _expected(layers), strict=True)
    sizes = sum(abs(math.log(seen / expected)) for seen, expected in pairs)
    kernel = _kernel(graph.name(node))
    return 100 * any(layer["kernel"].partition("_")[0] != kernel for layer in layers) + sizes


def _is_layer(name: str) -> bool:
    """Whether an operator holds a convolution or a fully-connected layer, by its name."""
    return "conv" in name or _is_fully_connected(name)


def _is_fully_connected(name: str) -> bool:
    return "dense" in name or "matmul" in name


def _kernel(name: str) -> str:
    if "dense_sparse" in name:
        return DIRECT
    if _CHAIN in name:
        return "winograd"
    kinds = (kind for kind in (DIRECT, "winograd") if f"sparse_{kind}" in name)
    return next(kinds, DENSE)


def _parameters(graph: _Graph, node: int) -> list[int]:
    """Elements of each of an operator's parameters."""
    return [size for name, size in graph.inputs(node) if name in graph.parameters]


def _seen(graph: _Graph, node: int) -> tuple[int, int, int]:
    """Elements of an operator's output, of its data, and of all its parameters."""
    data = [size for name, size in graph.inputs(node) if name not in graph.parameters]
    return graph.size(node), data[0] if data else 1, max(1, sum(_parameters(graph, node)))


def _expected(layers: _Layers) -> tuple[int, int, float]:
    """The same of layers one after the other, non-zero weights for parameters."""
    weights = sum(map(_weights, layers))
    return math.prod(layers[-1]["output_shape"]), math.prod(layers[0]["input_shape"]), max(1.0, weights)


def _weights(layer: Mapping[str, Any]) -> float:
    """Non-zero ones, those of the kernel."""
    filters, channels, *kernel = layer["weight_shape"]
    zeros = layer["spatial_sparsity"] if layer["kernel"] == DIRECT else 0.0
    if layer["kernel"] in TILE:
        kernel = [TILE[layer["kernel"]] + size - 1 for size in kernel]
        zeros = layer["winograd_sparsity"][layer["kernel"]]
    return filters * channels * math.prod(kernel) * (1 - (zeros or 0.0))


def _dense_work(graph: _Graph, node: int) -> int | None:
    """Multiply-adds of a dense fully-connected layer that no plan speaks of: its weights, the largest of its inputs,
    once for each row of data."""
    name = graph.name(node)
    if not _is_fully_connected(name) or _kernel(name) != DENSE:
        return None
    return max(size for _, size in graph.inputs(node)) * graph.shape(node)[0]
