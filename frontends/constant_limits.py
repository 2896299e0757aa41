"""Refuse models that compute large values from constants alone, before anything computes them.

TVM's importer and its constant folding evaluate what depends on no input. A graph of a few bytes, a ConstantOfShape
say, can make them allocate any amount. Sizes are those of ONNX's shape inference, or bounds that follow from the
operator.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Sequence
from contextlib import suppress

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from . import onnx_graph
from .container import AXES_MOST, WEIGHTS_MOST
from .errors import InputError

# What any model may compute from constants, and how many times the bytes of its tensors in addition.
SPARE = 2**28
TIMES = 4

# Elements; no shape, axis list or the like is longer.
_LARGE = 1024

# Operators whose result depends on the shape of their input alone, which is fixed here.
_OF_SHAPE = {"Shape", "Size", "EyeLike"}
_SHORT = {"Shape", "Size"}
# No more elements than all inputs, or the results of all branches, together.
_SHRINKING = {
    *("Abs", "ArgMax", "ArgMin", "BitwiseNot", "Cast", "CastLike", "Ceil", "Clip", "Compress", "Concat", "Cos"),
    *("CumSum", "DepthToSpace", "Erf", "Exp", "Flatten", "Floor", "Identity", "If", "IsInf", "IsNaN", "Log", "Neg"),
    *("Not", "Reciprocal", "Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Shrink", "Sigmoid", "Sign"),
    *("Sin", "Slice", "Softmax", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Tanh", "TopK", "Transpose", "Trilu"),
    *("Unique", "Unsqueeze", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
}
# No more elements than the product of all inputs' elements: broadcasting at its worst.
_BROADCASTING = {
    *("Add", "And", "BitShift", "Div", "Equal", "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual"),
    *("Less", "LessOrEqual", "MatMul", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor"),
}


def check(model: ModelProto, name: str) -> None:
    """Add up all that the model, of fixed input shapes, computes from constants alone; ``name`` is for messages.

    Raises:
        InputError: it is more than SPARE bytes and TIMES the bytes of the model's tensors, or more than a model may
            hold, or a size cannot be told.
    """
    stored = sum(math.prod(tensor.dims) * _item_size(tensor.data_type) for tensor in onnx_graph.tensors(model.graph))
    outline, large = _outline(model)
    with suppress(Exception):  # what is not inferred is bounded or refused below
        outline = onnx.shape_inference.infer_shapes(outline, data_prop=True)
    _Count(name, min(WEIGHTS_MOST, SPARE + TIMES * stored)).add(outline.graph, ChainMap(large))


class _Count:
    """The bytes computed so far, in a graph and the graphs within it."""

    def __init__(self, name: str, most: int) -> None:
        self.name = name
        self.most = most
        self.total = 0

    def add(self, graph: GraphProto, outer: ChainMap[str, int]) -> ChainMap[str, int]:
        """The most elements that each constant value of the graph has, those of the graph around it included."""
        constants = outer.new_child({tensor.name: math.prod(tensor.dims) for tensor in graph.initializer})
        types = {value.name: value for value in (*graph.value_info, *graph.output)}
        for node in graph.node:
            branches = [self.add(inner, constants) for inner in _inner(node)]
            reads = {name for name in node.input if name} | _captured(node)
            if node.op_type not in _OF_SHAPE and not all(name in constants for name in reads):
                continue
            sizes = [constants.get(name, 0) for name in node.input if name]
            sizes += [branch.get(v.name, 0) for g, branch in zip(_inner(node), branches, strict=True) for v in g.output]
            for output in filter(None, node.output):
                constants[output] = self._enter(node, types.get(output, ValueInfoProto(name=output)), sizes)
        return constants

    def _enter(self, node: NodeProto, output: ValueInfoProto, sizes: Sequence[int]) -> int:
        elements = _elements(output)
        elements = _bound(node, sizes) if elements is None else elements
        label = f"{node.op_type} {(node.name or output.name)!r}"
        if elements is None:
            raise InputError(
                f"{self.name}: {label} is computed from constants alone and its size cannot be told; "
                "fold the constants of the model first"
            )
        if node.op_type != "Constant":
            self.total += elements * _item_size(output.type.tensor_type.elem_type)
        if self.total > self.most:
            raise InputError(
                f"{self.name}: {self.total:,} bytes are computed from constants alone as far as {label}, at most "
                f"{self.most:,} are allowed; store large constants as tensors"
            )
        return elements


def _bound(node: NodeProto, sizes: Sequence[int]) -> int | None:
    """The most elements an output can have where ONNX cannot tell; None if there is no saying."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Constant":
        return _constant_elements(node)
    if node.op_type in _SHORT:
        return AXES_MOST
    if node.op_type in _SHRINKING:
        return sum(sizes)
    if node.op_type in _BROADCASTING:
        return math.prod(max(size, 1) for size in sizes)
    return AXES_MOST * sum(sizes) if node.op_type == "NonZero" else None


def _constant_elements(node: NodeProto) -> int:
    """Of the forms that ``onnx_graph.tidy`` leaves: a tensor, sparse or not, or strings."""
    item = node.attribute[0]
    if item.name == "value":
        return math.prod(item.t.dims)
    return math.prod(item.sparse_tensor.dims) if item.name == "sparse_value" else max(len(item.strings), 1)


def _inner(node: NodeProto) -> list[GraphProto]:
    return [g for item in node.attribute for g in (*([item.g] if item.HasField("g") else []), *item.graphs)]


def _captured(node: NodeProto) -> set[str]:
    """What the graphs inside a node read of the graphs around it."""
    captured: set[str] = set()
    for graph in _inner(node):
        made = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        made |= {name for inner in graph.node for name in inner.output}
        reads = {name for inner in graph.node for name in (*inner.input, *_captured(inner)) if name}
        captured |= (reads | {value.name for value in graph.output}) - made
    return captured


def _outline(model: ModelProto) -> tuple[ModelProto, dict[str, int]]:
    """The model without what it says of shapes and without its large tensors; these are inputs, and returned by name.

    What a file says of a value need not be true, and inference copies all it is given.
    """
    outline = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = outline.graph
    graph.input.extend(model.graph.input)
    graph.initializer.extend(t for t in model.graph.initializer if not _is_large(t))
    graph.node.extend(node for node in model.graph.node if not _is_large_constant(node))
    graph.output.extend(model.graph.output)
    large = {t.name: t for t in model.graph.initializer if _is_large(t)}
    large |= {node.output[0]: node.attribute[0].t for node in model.graph.node if _is_large_constant(node)}
    graph.input.extend(helper.make_tensor_value_info(name, t.data_type, t.dims) for name, t in large.items())
    for inner in onnx_graph.graphs(graph):
        inner.ClearField("value_info")
        for value in inner.output:
            value.type.tensor_type.ClearField("shape")
    return outline, {name: math.prod(t.dims) for name, t in large.items()}


def _is_large(tensor: TensorProto) -> bool:
    return math.prod(tensor.dims) > _LARGE


def _is_large_constant(node: NodeProto) -> bool:
    return node.op_type == "Constant" and node.attribute[0].name == "value" and _is_large(node.attribute[0].t)


def _elements(value: ValueInfoProto) -> int | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(axis.HasField("dim_value") for axis in tensor.shape.dim):
        return None
    return math.prod(max(axis.dim_value, 0) for axis in tensor.shape.dim)


def _item_size(data_type: int) -> int:
    """Bytes of an element; 8 for what is not known."""
    try:
        return max(helper.tensor_dtype_to_np_dtype(data_type).itemsize, 1)
    except (KeyError, TypeError, ValueError):
        return 8
