"""The gaps of TVM 0.19's ONNX importer, closed on the graph before it.

TVM's classes are not patched. What its importer would get wrong in silence is rewritten into a form that it reads
well, or refused: the ``axes`` input of Reduce* (opset 13 and 18; it takes only the first axis, or none), ``axes`` of
Pad and Resize (18; ignored), antialiased and aspect-keeping Resize (18; ignored), Gelu by tanh (20; taken for the
exact one). Operators it does not know are replaced by their definition in terms of others where ONNX has one.
The newest opset that the installed onnx knows is read: TVM takes the newest converter it has for each operator.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping

import numpy as np
import onnx
import onnx.inliner
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from . import onnx_graph
from .constant_folding import fold_shape_arithmetic
from .errors import InputError

# Operators of which a weight stays a parameter of the Relay function; elsewhere initializers become constants, because
# TVM's importer wants to see the values of shapes, axes, scales and the like.
_WEIGHT_READERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Transpose"}
_REDUCTIONS = {
    f"Reduce{kind}" for kind in ("Max", "Min", "Sum", "Mean", "Prod", "LogSumExp", "SumSquare", "L1", "L2", "LogSum")
}


def prepare(model: ModelProto, name: str) -> ModelProto:
    """A checked model of fixed shapes, made fit for TVM's importer; ``name`` is for messages.

    Raises:
        InputError: the model has what TVM cannot import and no rewrite mends.
    """
    model = _define_unknown(model, name)
    onnx_graph.strip(model)
    shapes = _shapes(model)
    while fold_shape_arithmetic(model, shapes):
        shapes = _shapes(model)
    onnx_graph.tidy(model, name)
    for node in model.graph.node:
        if node.op_type in _REDUCTIONS:
            _axes_to_attribute(node, model, name)
        elif node.op_type == "Pad":
            _complete_pads(node, model, shapes, name)
        elif node.op_type == "Resize":
            _check_resize(node, model, shapes, name)
    onnx_graph.tidy(model, name)
    _freeze_constants(model)
    return model


def _define_unknown(model: ModelProto, name: str) -> ModelProto:
    """Replace operators that TVM lacks, or gets wrong, by their definition."""
    from tvm.relay.frontend.onnx import _get_convert_map, _identity_list

    known = {*_get_convert_map(onnx_graph.opset_version(model)), *_identity_list, "Constant"}
    used = {node.op_type for node in model.graph.node}
    inexact = {"Gelu"} if any(_is_tanh_gelu(node) for node in model.graph.node) else set()
    defined = sorted(op for op in (used - known) | inexact if _has_definition(op, model))
    if defined:
        # The inliner wants the types of all that goes into a definition.
        model.graph.value_info.extend(
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
        )
        model = onnx.inliner.inline_selected_functions(
            model, [("", op) for op in defined], inline_schema_functions=True
        )
        onnx_graph.tidy(model, name)
    left = {node.op_type for node in model.graph.node} - known
    if left:
        raise InputError(f"{name}: TVM 0.19 has no {', '.join(sorted(left))}; export the model without these operators")
    if any(_is_tanh_gelu(node) for node in model.graph.node):
        raise InputError(f"{name}: TVM 0.19 has no Gelu by tanh; export with opset 19 or lower")
    return model


def _is_tanh_gelu(node: NodeProto) -> bool:
    return node.op_type == "Gelu" and onnx_graph.attribute(node, "approximate", b"none") == b"tanh"


def _has_definition(op: str, model: ModelProto) -> bool:
    # The inliner of onnx 1.18 and older does not know the definitions in schemas.
    if "inline_schema_functions" not in inspect.signature(onnx.inliner.inline_selected_functions).parameters:
        return False
    try:
        schema = onnx.defs.get_schema(op, onnx_graph.opset_version(model))
    except onnx.defs.SchemaError:
        return False
    # Missing from onnx's type stubs.
    return bool(getattr(schema, "has_function", False) or getattr(schema, "has_context_dependent_function", False))


def _axes_to_attribute(node: NodeProto, model: ModelProto, name: str) -> None:
    """Opset 13 and 18 made ``axes`` an input; TVM reads the attribute of earlier opsets well."""
    if len(node.input) > 1:
        axes = _constant_input(node, 1, model, name)
        data = node.input[0]
        del node.input[:]
        node.input.append(data)
        if axes is not None and axes.size:
            node.attribute.append(helper.make_attribute("axes", [int(a) for a in axes.ravel()]))
    reduces = onnx_graph.attribute(node, "axes", None) is not None
    noop = onnx_graph.attribute(node, "noop_with_empty_axes", 0)
    kept = [onnx_graph.copied(a) for a in node.attribute if a.name != "noop_with_empty_axes"]
    del node.attribute[:]
    if noop and not reduces:
        _reduce_nothing(node, name)
        return
    node.attribute.extend(kept)


def _reduce_nothing(node: NodeProto, name: str) -> None:
    """Without axes nothing is summed, but what is done to each element still is."""
    each = {"ReduceL1": "Abs", "ReduceL2": "Abs", "ReduceLogSum": "Log"}
    if node.op_type == "ReduceSumSquare":
        node.input.append(node.input[0])
    node.op_type = "Mul" if node.op_type == "ReduceSumSquare" else each.get(node.op_type, "Identity")


def _complete_pads(node: NodeProto, model: ModelProto, shapes: Mapping[str, list[int]], name: str) -> None:
    """Opset 18: pads for some axes only. Write zeros for the others."""
    if len(node.input) < 4 or not node.input[3]:
        return
    rank = len(_known_shape(node.input[0], shapes, node, name))
    axes = _constant_input(node, 3, model, name)
    pads = _constant_input(node, 1, model, name)
    if axes is None or pads is None:
        raise InputError(f"{name}: {_label(node)} has no pads; export the model again")
    full = np.zeros((2, rank), np.int64)
    full[:, axes.ravel() % rank] = pads.reshape(2, -1)
    tensor = numpy_helper.from_array(full.ravel(), onnx_graph.fresh_name(model, f"{node.output[0]}.pads"))
    model.graph.initializer.append(tensor)
    inputs = [node.input[0], tensor.name, *node.input[2:3]]
    del node.input[:]
    node.input.extend(inputs)


def _check_resize(node: NodeProto, model: ModelProto, shapes: Mapping[str, list[int]], name: str) -> None:
    """Write ``axes`` of opset 18 out; refuse what TVM would ignore."""
    for option, harmless in (("antialias", 0), ("keep_aspect_ratio_policy", b"stretch")):
        if onnx_graph.attribute(node, option, harmless) != harmless:
            raise InputError(f"{name}: {_label(node)} has {option}, which TVM 0.19 lacks; export without it")
    shape = _known_shape(node.input[0], shapes, node, name)
    axes = onnx_graph.attribute(node, "axes", None)
    # Opset 10: data, scales. Later: data, region, scales, sizes.
    position = 1 if len(node.input) == 2 else 3 if len(node.input) > 3 and node.input[3] else 2
    values = _constant_input(node, position, model, name)
    if values is None:
        raise InputError(f"{name}: {_label(node)} has neither scales nor sizes; export the model again")
    if axes is not None:
        full = np.ones(len(shape), np.float32) if position < 3 else np.array(shape, np.int64)
        full[[a % len(shape) for a in axes]] = values.ravel()
        values = full
        tensor = numpy_helper.from_array(full, onnx_graph.fresh_name(model, f"{node.output[0]}.sizes"))
        model.graph.initializer.append(tensor)
        node.input[position] = tensor.name
        kept = [onnx_graph.copied(a) for a in node.attribute if a.name != "axes"]
        del node.attribute[:]
        node.attribute.extend(kept)
    sizes = values * np.array(shape) if position < 3 else values
    changed = [i for i, (new, old) in enumerate(zip(sizes, shape, strict=True)) if new != old]
    if any(i < 2 for i in changed):
        raise InputError(f"{name}: {_label(node)} resizes batch or channels, which TVM 0.19 lacks")
    # TVM takes the ratio of the sizes for the scale; they agree if the scaled size is whole.
    if position < 3 and any(not math.isclose(s, round(s), abs_tol=1e-3) for s in sizes.tolist()):
        raise InputError(f"{name}: {_label(node)} scales {shape} to a broken size; export with sizes instead of scales")


def _freeze_constants(model: ModelProto) -> None:
    """Initializers that are not weights become Constant nodes, whose values TVM's importer sees."""
    readers: dict[str, set[str]] = {}
    for graph in onnx_graph.graphs(model.graph):
        for node in graph.node:
            for value in node.input:
                readers.setdefault(value, set()).add(node.op_type)
    weights: list[TensorProto] = []
    frozen: list[TensorProto] = []
    for tensor in model.graph.initializer:
        is_weight = tensor.data_type == TensorProto.FLOAT and readers.get(tensor.name, set()) <= _WEIGHT_READERS
        (weights if is_weight and tensor.dims else frozen).append(onnx_graph.copied(tensor))
    outputs = {value.name for value in model.graph.output}
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in frozen if t.name not in outputs]
    nodes = constants + [onnx_graph.copied(node) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.initializer[:]
    model.graph.initializer.extend([*weights, *(t for t in frozen if t.name in outputs)])


def _shapes(model: ModelProto) -> dict[str, list[int]]:
    """Shapes of the values, as far as ONNX's inference knows them whole."""
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    # Inference is a help only: what needs a shape that is not there says so itself.
    except Exception:
        graph = model.graph
    known = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        axes = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(axis.HasField("dim_value") for axis in axes):
            known[value.name] = [axis.dim_value for axis in axes]
    return known | {tensor.name: list(tensor.dims) for tensor in graph.initializer}


def _known_shape(value: str, shapes: Mapping[str, list[int]], node: NodeProto, name: str) -> list[int]:
    if value not in shapes:
        raise InputError(f"{name}: the shape of {value!r}, which {_label(node)} needs, is unknown; give input shapes")
    return shapes[value]


def _constant_input(node: NodeProto, position: int, model: ModelProto, name: str) -> np.ndarray | None:
    """The value of an input that must be an initializer; None if it is left out."""
    if len(node.input) <= position or not node.input[position]:
        return None
    tensor = onnx_graph.initializers(model).get(node.input[position])
    if tensor is None:
        raise InputError(f"{name}: input {position} of {_label(node)} is computed; TVM 0.19 needs a constant there")
    return onnx_graph.array(tensor, name)


def _label(node: NodeProto) -> str:
    return f"{node.op_type} {(node.name or node.output[0])!r}"
