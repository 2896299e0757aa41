"""Reading and tidying ONNX models: the interchange form inside the front ends.

It works on a ``ModelProto`` in place and needs neither TVM nor torch.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from .errors import InputError

Source = str | os.PathLike[str] | ModelProto

# Which input of an operator is a weight, and which are its output and input channel axes.
_WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}

# Lines of TVM's and of Python's stacks, and how the message behind them begins.
_TRACE = re.compile(r"Traceback|Stack trace|File |\[bt\]|\d+: |-+$")
_RAISED = re.compile(r"[\w.]*Error:")


def read(source: Source) -> tuple[ModelProto, str]:
    """An own copy of the model, weights in other files included, and the name to use in messages.

    Raises:
        InputError: the file is missing, is no ONNX model, or does not pass ONNX's checker.
    """
    if isinstance(source, ModelProto):
        model = ModelProto()
        model.CopyFrom(source)
        name = "the ONNX model"
    elif isinstance(source, str | os.PathLike):
        name = str(source)
        model = _read_file(Path(source))
    else:
        raise InputError(f"expected an ONNX file or ModelProto, got {type(source).__name__}")
    check(model, name)
    return model, name


def check(model: ModelProto, name: str) -> None:
    """ONNX's own checker, its complaint cut to one line.

    Raises:
        InputError: the model is not valid.
    """
    if not model.graph.node and not model.graph.output:
        raise InputError(f"{name}: not an ONNX model (no graph in it); give a model saved by an ONNX exporter")
    opset = opset_version(model)
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise InputError(
            f"{name}: ONNX opset {opset} is newer than the installed onnx {onnx.__version__} reads (at most {newest}); "
            "install a newer onnx or export with a lower opset"
        )
    try:
        onnx.checker.check_model(model)
    # The checker raises its own error for invalid models, ValueError and others for what it cannot even walk.
    except Exception as error:
        raise InputError(f"{name}: not a valid ONNX model: {first_line(error)}") from error


def opset_version(model: ModelProto) -> int:
    """The version of the standard operator set the model uses."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)


def tidy(model: ModelProto, name: str) -> None:
    """One form for every exporter's habits: all constants are initializers, none is also an input, no loose ends.

    Constant nodes and Identity nodes of initializers become initializers (the legacy torch exporter replaces equal
    tensors by Identity nodes, which would hide a layer's weight name); unused initializers and dead nodes go.
    """
    if model.functions:
        model.CopyFrom(onnx.inliner.inline_local_functions(model))
    graph = model.graph
    if graph.sparse_initializer:
        raise InputError(f"{name}: sparse initializers are not supported; export the model with dense weights")
    _lift_constants(graph, name)
    _copy_identities(graph)
    _drop_dead(graph)
    constants = {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in constants]
    del graph.input[:]
    graph.input.extend(inputs)


def strip(model: ModelProto) -> None:
    """Remove what takes no part in the function: documentation, exporters' traces, inferable shapes."""
    model.ClearField("doc_string")
    for graph in graphs(model.graph):
        graph.ClearField("doc_string")
        graph.ClearField("value_info")
        graph.ClearField("quantization_annotation")
        graph.ClearField("metadata_props")
        for value in (*graph.input, *graph.output):
            value.ClearField("doc_string")
            value.ClearField("metadata_props")
        for tensor in graph.initializer:
            tensor.ClearField("doc_string")
            tensor.ClearField("metadata_props")
        for node in graph.node:
            node.ClearField("doc_string")
            node.ClearField("metadata_props")
            for attribute in node.attribute:
                attribute.ClearField("doc_string")


def fix_input_shapes(model: ModelProto, shapes: dict[str, tuple[int, ...]] | None, name: str) -> None:
    """Make every input dimension a number: from ``shapes``, else from the model; an open batch axis becomes 1.

    Raises:
        InputError: an input that is not there, a rank or size that contradicts the model, or an open axis but the
            first without a shape given for it.
    """
    shapes = dict(shapes or {})
    known = {i.name for i in model.graph.input}
    for stranger in shapes.keys() - known:
        raise InputError(f"{name}: no input {stranger!r}; the inputs are {', '.join(sorted(map(repr, known)))}")
    for value in model.graph.input:
        if not value.type.HasField("tensor_type"):
            raise InputError(f"{name}: input {value.name!r} is not a tensor; only tensors are supported")
        _fix_shape(value, shapes.get(value.name), name)


def array(tensor: TensorProto, name: str = "") -> NDArray[Any]:
    """The tensor as a numpy array.

    Raises:
        InputError: its data do not fit its shape or type.
    """
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except Exception as error:
        raise InputError(f"{name}: tensor {tensor.name!r} cannot be read: {first_line(error)}") from error


def initializers(model: ModelProto) -> dict[str, TensorProto]:
    """The initializers of the main graph by name."""
    return {t.name: t for t in model.graph.initializer}


def weight_uses(model: ModelProto) -> dict[str, list[NodeProto]]:
    """Initializers that are the weight of a Conv, ConvTranspose, Gemm or MatMul, with the nodes that use them so."""
    constants = initializers(model)
    uses: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        index = _WEIGHT_INPUT.get(node.op_type)
        if index is not None and node.domain in ("", "ai.onnx") and len(node.input) > index:
            weight = node.input[index]
            if weight in constants:
                uses.setdefault(weight, []).append(node)
    return uses


def layers(model: ModelProto) -> dict[str, NodeProto]:
    """The weights of convolutions and dense layers and the first node that reads each, behind a Transpose as well."""
    found = {name: nodes[0] for name, nodes in weight_uses(model).items()}
    constants = initializers(model)
    transposed = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] in constants
    }
    for node in model.graph.node:
        if node.op_type in ("Gemm", "MatMul"):
            found |= {transposed[name]: node for name in node.input[:2] if name in transposed}
    return found


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute, or ``default``."""
    for candidate in node.attribute:
        if candidate.name == name:
            return onnx.helper.get_attribute_value(candidate)
    return default


def use_counts(graph: GraphProto) -> Counter[str]:
    """How often each value is read: by nodes, by nodes of subgraphs, and as an output of the graph."""
    counts: Counter[str] = Counter()
    for inner in graphs(graph):
        counts.update(name for node in inner.node for name in node.input)
        counts.update(value.name for value in inner.output)
    return counts


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all graphs inside its nodes' attributes."""
    yield graph
    for node in graph.node:
        for item in node.attribute:
            for inner in (*([item.g] if item.HasField("g") else []), *item.graphs):
                yield from graphs(inner)


def tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor in the graph and the graphs inside it: initializers and attributes of nodes."""
    for inner in graphs(graph):
        yield from inner.initializer
        for sparse in inner.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for item in (item for node in inner.node for item in node.attribute):
            yield from ([item.t] if item.HasField("t") else [])
            yield from item.tensors
            for sparse in (*([item.sparse_tensor] if item.HasField("sparse_tensor") else []), *item.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def fresh_name(model: ModelProto, wanted: str) -> str:
    """``wanted``, or with a number behind it if the model uses that name already."""
    used = {t.name for t in model.graph.initializer} | {v.name for v in model.graph.input}
    used |= {name for node in model.graph.node for name in (*node.input, *node.output)}
    candidate, number = wanted, 1
    while candidate in used:
        candidate, number = f"{wanted}.{number}", number + 1
    return candidate


def metadata(model: ModelProto, key: str) -> str | None:
    """The value under ``key`` in the model's metadata."""
    return next((p.value for p in model.metadata_props if p.key == key), None)


def set_metadata(model: ModelProto, key: str, value: str | None) -> None:
    """Set, or with None remove, a value in the model's metadata."""
    kept = [p for p in model.metadata_props if p.key != key]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    if value is not None:
        model.metadata_props.add(key=key, value=value)


def replace_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    """Make these, some of the graph's own, all its nodes."""
    if len(nodes) != len(graph.node):
        copies = [copied(node) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def copied(message: Any) -> Any:
    """A copy that outlives its container being cleared."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def first_line(error: BaseException) -> str:
    """An exception in one line, for messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not _TRACE.match(line)]
    start = 0
    if len(told) < len(lines):  # TVM puts its stack before the message, and source code into it
        start = max((i for i, line in enumerate(told) if _RAISED.match(line)), default=0)
    line = " ".join(told[start : start + 1 + _is_bare(told[start])]) if told else type(error).__name__
    if "bad_alloc" in line:  # C++'s name for it, which TVM spells wrong
        line = "out of memory"
    return line if len(line) <= 300 else line[:297] + "..."


def _is_bare(line: str) -> bool:
    """Whether an error's message begins on the next line only."""
    return bool(_RAISED.fullmatch(line))


def _read_file(path: Path) -> ModelProto:
    try:
        return onnx.load(path)
    except FileNotFoundError as error:
        missing = getattr(error, "filename", None)
        detail = "" if missing in (None, str(path)) else f" (it needs {missing})"
        raise InputError(f"{path}: no such file{detail}; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None
    except DecodeError:
        raise InputError(f"{path}: not an ONNX model, or damaged; export it again") from None
    # External data: wrong offsets, links out of the folder, wrong lengths; onnx has no common error for them.
    except Exception as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error


def _lift_constants(graph: GraphProto, name: str) -> None:
    kept = []
    for node in graph.node:
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            kept.append(node)
            continue
        tensor = _constant_value(node)
        if tensor is None:
            kept.append(node)
            continue
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
    replace_nodes(graph, kept)


def _constant_value(node: NodeProto) -> TensorProto | None:
    """The tensor a Constant node makes; None for strings and sparse tensors, which stay as they are."""
    tensor = TensorProto()
    for item in node.attribute:
        if item.name == "value":
            tensor.CopyFrom(item.t)
            return tensor
        if item.name in ("value_float", "value_floats"):
            value = item.f if item.name == "value_float" else list(item.floats)
            return numpy_helper.from_array(np.array(value, np.float32))
        if item.name in ("value_int", "value_ints"):
            value = item.i if item.name == "value_int" else list(item.ints)
            return numpy_helper.from_array(np.array(value, np.int64))
    return None


def _copy_identities(graph: GraphProto) -> None:
    constants = {t.name: t for t in graph.initializer}
    outputs = {v.name for v in graph.output}
    kept = []
    for node in graph.node:
        source = constants.get(node.input[0]) if node.op_type == "Identity" else None
        if source is None or node.output[0] in outputs:
            kept.append(node)
            continue
        copy = graph.initializer.add()
        copy.CopyFrom(source)
        copy.name = node.output[0]
        constants[copy.name] = copy
    replace_nodes(graph, kept)


def _drop_dead(graph: GraphProto) -> None:
    """Remove nodes nobody reads, last first, then initializers nobody reads."""
    counts = use_counts(graph)
    kept = []
    for node in reversed(graph.node):
        if any(counts[name] for name in node.output if name):
            kept.append(node)
            continue
        counts.subtract(node.input)
        for item in node.attribute:
            for inner in (*([item.g] if item.HasField("g") else []), *item.graphs):
                counts.subtract(use_counts(inner))
    replace_nodes(graph, kept[::-1])
    alive = [t for t in graph.initializer if counts[t.name]]
    if len(alive) != len(graph.initializer):
        alive = [copied(t) for t in alive]
        del graph.initializer[:]
        graph.initializer.extend(alive)


def _fix_shape(value: onnx.ValueInfoProto, given: tuple[int, ...] | None, name: str) -> None:
    tensor = value.type.tensor_type
    axes = list(tensor.shape.dim)
    if not tensor.HasField("shape"):
        if given is None:
            raise InputError(f"{name}: input {value.name!r} has no shape; give one: shape={{{value.name!r}: (...)}}")
        axes = [tensor.shape.dim.add() for _ in given]
    if given is not None and len(given) != len(axes):
        raise InputError(f"{name}: input {value.name!r} has {len(axes)} axes, the shape given has {len(given)}")
    for index, axis in enumerate(axes):
        fixed = axis.dim_value if axis.HasField("dim_value") and axis.dim_value > 0 else None
        wanted = fixed if given is None else int(given[index])
        if wanted is None and index > 0:
            label = f" ({axis.dim_param})" if axis.dim_param else ""
            raise InputError(
                f"{name}: axis {index}{label} of input {value.name!r} is open; give its shape: "
                f"shape={{{value.name!r}: (...)}}"
            )
        wanted = 1 if wanted is None else wanted
        if wanted < 1 or (fixed is not None and wanted != fixed):
            raise InputError(
                f"{name}: axis {index} of input {value.name!r} is {fixed or 'open'} in the model, {wanted} was given"
            )
        axis.dim_value = wanted
