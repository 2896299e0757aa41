"""Compute what is known of an ONNX graph's shape arithmetic, so that sizes and scales stand there as constants.

Exporters write the size of a Resize as a chain of Shape, Slice, Cast and Concat. With fixed inputs the chain has one
value. ONNX's reference evaluator computes it, node by node; only small tensors are touched, and only by operators that
cannot make large ones of them, so that a stranger's graph costs no more than its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from . import onnx_graph

_SMALL = 64
_ARITHMETIC = {"Abs", "Add", "Ceil", "Div", "Equal", "Floor", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Round", "Sub"}
_MOVES = {"Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze", "Where"}


def fold_shape_arithmetic(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Replace in place nodes whose value follows from constants and from the shapes known.

    Args:
        shapes: of values whose shape is known, for the Shape and Size operators.

    Returns:
        whether any was replaced: more shapes may follow from its value then.
    """
    known = {t.name: onnx_graph.array(t) for t in model.graph.initializer if np.prod(t.dims) <= _SMALL}
    outputs = {value.name for value in model.graph.output}
    opset = onnx_graph.opset_version(model)
    kept = []
    for node in model.graph.node:
        value = None if outputs.intersection(node.output) else _value(node, known, shapes, opset)
        if value is None or value.size > _SMALL:
            kept.append(node)
            continue
        known[node.output[0]] = value
        model.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    changed = len(kept) < len(model.graph.node)
    onnx_graph.replace_nodes(model.graph, kept)
    return changed


def _value(
    node: NodeProto, known: Mapping[str, NDArray[Any]], shapes: Mapping[str, Sequence[int]], opset: int
) -> NDArray[Any] | None:
    """What the node's one output is, if that can be told."""
    if len(node.output) != 1 or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in ("Shape", "Size"):
        return _measure(node, shapes)
    if any(name and name not in known for name in node.input):
        return None
    if node.op_type not in _ARITHMETIC | _MOVES and not _is_short_range(node, known):
        return None
    graph = helper.make_graph(
        [node],
        "node",
        [helper.make_value_info(name, helper.make_tensor_type_proto(0, None)) for name in set(node.input) if name],
        [helper.make_value_info(node.output[0], helper.make_tensor_type_proto(0, None))],
    )
    evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]))
    try:
        value = next(iter(evaluator.run(None, {name: known[name] for name in node.input if name})))
    # The evaluator raises whatever numpy does; the node is then left for TVM to judge.
    except Exception:
        return None
    return np.asarray(value) if isinstance(value, np.ndarray | np.generic) else None


def _is_short_range(node: NodeProto, known: Mapping[str, NDArray[Any]]) -> bool:
    values = [known[name] for name in node.input if name]
    if node.op_type != "Range" or len(values) != 3 or any(value.size != 1 for value in values):
        return False
    start, limit, step = (float(value.item()) for value in values)
    return step != 0 and (limit - start) / step <= _SMALL


def _measure(node: NodeProto, shapes: Mapping[str, Sequence[int]]) -> NDArray[np.int64] | None:
    shape = shapes.get(node.input[0])
    if shape is None:
        return None
    if node.op_type == "Size":
        return np.array(np.prod(shape), np.int64)
    start, end = onnx_graph.attribute(node, "start", 0), onnx_graph.attribute(node, "end", len(shape))
    return np.array(list(shape)[start:end], np.int64)
