"""Small ONNX models made without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper


def two_convolutions(size: int = 12, sparsity: float = 0.8) -> ModelProto:
    """Input x, 1 x 4 x size x size; 3x3 to 8 channels, ReLU, 3x3 stride 2 to 4 channels; output y. Pruned at random."""
    rng = np.random.default_rng(0)
    weights = {"first.weight": (8, 4, 3, 3), "second.weight": (4, 8, 3, 3)}
    initializers = []
    for name, shape in weights.items():
        values = rng.normal(size=shape) * (rng.random(shape) >= sparsity)
        initializers.append(numpy_helper.from_array(values.astype(np.float32), name))
    nodes = [
        helper.make_node("Conv", ["x", "first.weight"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second.weight"], ["y"], "second", pads=[1, 1, 1, 1], strides=[2, 2]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, size, size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, size // 2, size // 2])
    graph = helper.make_graph(nodes, "two_convolutions", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write(model: ModelProto, path: Path) -> Path:
    """Save and return the path."""
    onnx.save_model(model, path)
    return path
