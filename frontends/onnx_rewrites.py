"""The gaps of TVM 0.19's ONNX importer, closed on the graph before it.

TVM's classes are not patched. What its importer would get wrong in silence is rewritten into a form that it reads
well, or refused with a line that names the node: ``_RULES`` says where, operator by operator; Gelu by tanh (opset 20)
is replaced too. Operators TVM does not know are replaced by their definition in terms of others where ONNX has one.
Nodes in the branches of If and the bodies of loops are not rewritten. The newest opset that the installed onnx knows
is read: TVM takes the newest converter it has for each operator.
"""

from __future__ import annotations

import inspect

import onnx
import onnx.inliner
from onnx import ModelProto, NodeProto, TensorProto, helper

from . import onnx_graph, onnx_operators, onnx_pooling, onnx_resizing
from .constant_folding import fold_shape_arithmetic
from .errors import InputError
from .onnx_operators import Rule, Site

# Operators of which a weight stays a parameter of the Relay function; elsewhere initializers become constants, because
# TVM's importer wants to see the values of shapes, axes, scales and the like.
_WEIGHT_READERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Transpose"}
_REDUCTIONS = ("Max", "Min", "Sum", "Mean", "Prod", "LogSumExp", "SumSquare", "L1", "L2", "LogSum")
_RULES: dict[str, Rule] = {
    "AveragePool": onnx_pooling.average_pool,
    "BatchNormalization": onnx_operators.batch_normalization,
    "Clip": onnx_operators.clip,
    "Dropout": onnx_operators.dropout,
    "GlobalLpPool": onnx_pooling.global_lp_pool,
    "LpPool": onnx_pooling.lp_pool,
    "MaxPool": onnx_pooling.max_pool,
    "Mod": onnx_operators.mod,
    "Pad": onnx_operators.pad,
    "Resize": onnx_resizing.resize,
    "SpaceToDepth": onnx_operators.space_to_depth,
    "Split": onnx_operators.split,
    "Swish": onnx_operators.swish,
    "Upsample": onnx_resizing.upsample,
    **{f"Reduce{kind}": onnx_operators.reduction for kind in _REDUCTIONS},
}


def prepare(model: ModelProto, name: str) -> ModelProto:
    """A checked model of fixed shapes, made fit for TVM's importer; ``name`` is for messages.

    Raises:
        InputError: the model has what TVM cannot import and no rewrite mends.
    """
    model = _define_unknown(model, name)
    onnx_graph.strip(model)
    shapes, types = _infer(model)
    while fold_shape_arithmetic(model, shapes):
        shapes, types = _infer(model)
    onnx_graph.tidy(model, name)
    _apply_rules(model, Site(model, shapes, types, name))
    onnx_graph.tidy(model, name)
    _freeze_constants(model)
    return model


def _apply_rules(model: ModelProto, site: Site) -> None:
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        nodes.extend(rule(node, site) if rule else [node])
    nodes = [onnx_graph.copied(node) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _define_unknown(model: ModelProto, name: str) -> ModelProto:
    """Replace operators that TVM lacks, or gets wrong, by their definition."""
    from tvm.relay.frontend.onnx import _get_convert_map, _identity_list

    known = {*_get_convert_map(onnx_graph.opset_version(model)), *_identity_list, *_RULES, "Constant"}
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


def _infer(model: ModelProto) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Shapes and element types of the values, as far as ONNX's inference knows them whole."""
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    # Inference is a help only: what needs a shape that is not there says so itself.
    except Exception:
        graph = model.graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type:
            types.setdefault(value.name, tensor.elem_type)
        if tensor.HasField("shape") and all(axis.HasField("dim_value") for axis in tensor.shape.dim):
            shapes.setdefault(value.name, [axis.dim_value for axis in tensor.shape.dim])
    return shapes, types
