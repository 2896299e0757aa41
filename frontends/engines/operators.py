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

from .tvm_build import open_package

MIN_RUNS = 5
_PREFIX = "tvmgen_default_"


@dataclass(frozen=True)
class Operator:
    """One fused operator.

    Attributes:
        name: TVM's. layer: of the plan, empty where it is no convolution or could not be told.
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

    graph, library, parameters = open_package(package)
    described = json.loads(graph)
    nodes = described["nodes"]
    operators = [i for i, node in enumerate(nodes) if node["op"] != "null" and _name(node) != "__nop"]
    with tempfile.TemporaryDirectory() as folder:
        executor = debug_executor.create(graph, library, tvm.cpu(), dump_root=folder)
        executor.load_params(parameters)
        for name, value in inputs.items():
            executor.set_input(name, value)
        least = _least(executor.module["execute_node"], operators, seconds)
        executor.exit()
    layers = _layers(described, operators, plan)
    return [
        Operator(
            _name(nodes[i]).removeprefix(_PREFIX),
            str(layers[i]["name"]) if i in layers else "",
            least[i],
            layers[i]["multiplications"] if i in layers else _dense_work(described, i),
        )
        for i in operators
    ]


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


def _name(node: Mapping[str, Any]) -> str:
    return node.get("attrs", {}).get("func_name", node["name"])


def _layers(
    graph: Mapping[str, Any], operators: Sequence[int], plan: Sequence[Mapping[str, Any]]
) -> dict[int, Mapping[str, Any]]:
    """The convolution of the plan that each node runs.

    Both are in the order in which they run. Where their numbers differ (a convolution folded away, or several in one
    operator) nothing is said rather than something wrong.
    """
    convolutions = [i for i in operators if "conv" in _name(graph["nodes"][i])]
    return dict(zip(convolutions, plan, strict=True)) if len(convolutions) == len(plan) else {}


def _dense_work(graph: Mapping[str, Any], node: int) -> int | None:
    """Multiply-adds of a fully-connected layer: its weights, the largest of its inputs, once for each row of data."""
    name = _name(graph["nodes"][node])
    if not ("dense" in name or "matmul" in name):
        return None
    places, shapes = graph["node_row_ptr"], graph["attrs"]["shape"][1]
    sizes = [math.prod(shapes[places[source] + index]) for source, index, *_ in graph["nodes"][node]["inputs"]]
    rows = shapes[places[node]][0]
    return max(sizes) * rows
