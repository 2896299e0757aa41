"""Single ONNX operators that TVM 0.19's importer reads wrongly: written in terms of what it reads well, or refused.

A rule gets a node and its ``Site`` and returns the nodes to put in its place, the node itself, changed or not,
among them. Rules for pooling and for resizing have modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from . import onnx_graph
from .errors import InputError


@dataclass(frozen=True)
class Site:
    """What a rule may know beside the node: the model, shapes and element types of its values, a name for messages."""

    model: ModelProto
    shapes: Mapping[str, Sequence[int]]
    types: Mapping[str, int]
    name: str

    @property
    def opset(self) -> int:
        """The version of the standard operators."""
        return onnx_graph.opset_version(self.model)

    def error(self, node: NodeProto, complaint: str) -> InputError:
        """A refusal that names the node."""
        return InputError(f"{self.name}: {_label(node)} {complaint}")

    def shape(self, node: NodeProto) -> list[int]:
        """The shape of the node's first input, which must be known."""
        value = node.input[0]
        if value not in self.shapes:
            raise InputError(
                f"{self.name}: the shape of {value!r}, which {_label(node)} needs, is unknown; give input shapes"
            )
        return list(self.shapes[value])

    def dtype(self, node: NodeProto) -> np.dtype[Any]:
        """The element type of the node's first input, which must be known."""
        if node.input[0] not in self.types:
            raise self.error(node, f"reads {node.input[0]!r}, whose type is unknown; export the model again")
        return np.dtype(helper.tensor_dtype_to_np_dtype(self.types[node.input[0]]))

    def known(self, node: NodeProto, position: int) -> NDArray[Any] | None:
        """The value of an input, None if it is left out or computed."""
        tensor = onnx_graph.initializers(self.model).get(_input(node, position))
        return None if tensor is None else onnx_graph.array(tensor, self.name)

    def constant(self, node: NodeProto, position: int) -> NDArray[Any] | None:
        """The value of an input that must be an initializer; None if it is left out."""
        value = self.known(node, position)
        if value is None and _input(node, position):
            raise InputError(
                f"{self.name}: input {position} of {_label(node)} is computed; TVM 0.19 needs a constant there"
            )
        return value

    def store(self, value: NDArray[Any], wanted: str) -> str:
        """A new initializer; its name."""
        name = onnx_graph.fresh_name(self.model, wanted)
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name


class Chain:
    """The nodes that take a node's place, each reading the one before it, ``value``, first."""

    def __init__(self, node: NodeProto, site: Site) -> None:
        self.value = node.input[0]
        self._node, self._site = node, site
        self._nodes: list[NodeProto] = []

    def then(self, op: str, *others: str | NDArray[Any], **attributes: Any) -> Chain:
        """One more operator; its inputs behind the first are names or constants."""
        self.value = self.beside(op, self.value, *others, **attributes)
        return self

    def beside(self, op: str, *inputs: str | NDArray[Any], **attributes: Any) -> str:
        """An operator that is no link of the chain, but may be read by one; the name of its output."""
        output = self._node.output[0]
        names = [x if isinstance(x, str) else self._site.store(x, f"{output}.{op}") for x in inputs]
        made = onnx_graph.fresh_name(self._site.model, f"{output}.{len(self._nodes)}")
        self._nodes.append(helper.make_node(op, names, [made], **attributes))
        return made

    def end(self) -> list[NodeProto]:
        """The nodes; the last one makes what the replaced node made."""
        if not self._nodes:
            self.then("Identity")
        self._nodes[-1].output[0] = self._node.output[0]
        return self._nodes


Rule = Callable[[NodeProto, Site], list[NodeProto]]


def set_attributes(node: NodeProto, **values: Any) -> None:
    """Set attributes; None removes one."""
    kept = [onnx_graph.copied(a) for a in node.attribute if a.name not in values]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(helper.make_attribute(k, v) for k, v in values.items() if v is not None)


def set_inputs(node: NodeProto, *names: str) -> None:
    """Set all inputs."""
    del node.input[:]
    node.input.extend(names)


def clip(node: NodeProto, site: Site) -> list[NodeProto]:
    """TVM forgets a bound unless both are constants, and takes the lower one of two that cross, ONNX the upper."""
    if site.opset < 11:
        low, high = (onnx_graph.attribute(node, bound, None) for bound in ("min", "max"))
        if low is not None and high is not None and low > high:
            set_attributes(node, min=high)
        return [node]
    low, high = site.known(node, 1), site.known(node, 2)
    if low is not None and high is not None and low.size == high.size == 1 and low.item() <= high.item():
        return [node]
    chain = Chain(node, site)
    for position, op in ((1, "Max"), (2, "Min")):
        if _input(node, position):
            chain.then(op, node.input[position])
    return chain.end()


def batch_normalization(node: NodeProto, site: Site) -> list[NodeProto]:
    """TVM knows the inference of it only. Before opset 14 further outputs meant training."""
    if onnx_graph.attribute(node, "training_mode", 0) or any(node.output[1:]):
        raise site.error(node, "is in training mode; export the model in evaluation mode (in torch: model.eval())")
    return [node]


def dropout(node: NodeProto, site: Site) -> list[NodeProto]:
    """Nothing is dropped in inference, whatever the ratio and the seed; the mask is all true."""
    training = site.constant(node, 2)
    if training is not None and training.any():
        raise site.error(node, "is in training mode; export the model in evaluation mode (in torch: model.eval())")
    if len(node.output) > 1 and onnx_graph.use_counts(site.model.graph)[node.output[1]]:
        mask = numpy_helper.from_array(np.ones(site.shape(node), bool), node.output[1])
        site.model.graph.initializer.append(mask)
    return [helper.make_node("Dropout", node.input[:1], node.output[:1], node.name)]


def mod(node: NodeProto, site: Site) -> list[NodeProto]:
    """TVM's C remainder of floats is exact; the one by floor (opset 28) is not, and is made of the other."""
    if onnx_graph.attribute(node, "fmod", 0) or np.issubdtype(site.dtype(node), np.integer):
        return [node]
    divisor, zero = node.input[1], np.zeros((), site.dtype(node))
    chain = Chain(node, site).then("Mod", divisor, fmod=1)
    remainder, sign = chain.value, chain.beside("Sign", divisor)
    # The signs, not the values: the product of two small values may be zero.
    chain.then("Sign").then("Mul", sign).then("Less", zero)
    return chain.then("Where", divisor, zero).then("Add", remainder).end()


def space_to_depth(node: NodeProto, site: Site) -> list[NodeProto]:
    """TVM ignores the mode of opset 28."""
    mode = onnx_graph.attribute(node, "mode", b"DCR")
    set_attributes(node, mode=None)
    if mode == b"DCR":
        return [node]
    batch, channels, height, width = site.shape(node)
    block = onnx_graph.attribute(node, "blocksize", 1)
    rows, columns = height // block, width // block
    chain = Chain(node, site).then("Reshape", np.array([batch, channels, rows, block, columns, block]))
    chain.then("Transpose", perm=[0, 1, 3, 5, 2, 4])
    return chain.then("Reshape", np.array([batch, channels * block * block, rows, columns])).end()


def split(node: NodeProto, site: Site) -> list[NodeProto]:
    """Opset 18: the last of ``num_outputs`` parts may be smaller; TVM makes equal ones only."""
    count = onnx_graph.attribute(node, "num_outputs", None)
    set_attributes(node, num_outputs=None)
    if count is None or _input(node, 1):
        return [node]
    shape = site.shape(node)
    total = shape[onnx_graph.attribute(node, "axis", 0)]
    part = -(-total // count)
    last = total - part * (count - 1)
    if last < 0:
        raise site.error(node, f"splits {total} entries into {count} parts, which leaves some empty; use fewer parts")
    set_inputs(node, node.input[0], site.store(np.array([part] * (count - 1) + [last]), f"{node.output[0]}.sizes"))
    return [node]


def swish(node: NodeProto, site: Site) -> list[NodeProto]:
    """Opset 24: x sigmoid(alpha x), unknown to TVM."""
    chain, data = Chain(node, site), node.input[0]
    alpha = onnx_graph.attribute(node, "alpha", 1.0)
    if alpha != 1:
        chain.then("Mul", np.array(alpha, site.dtype(node)))
    return chain.then("Sigmoid").then("Mul", data).end()


def pad(node: NodeProto, site: Site) -> list[NodeProto]:
    """Write pads of some axes out (opset 18; TVM ignores the axes), and wrap-around (19; unknown to TVM) as Gather."""
    if _input(node, 3):
        _complete_pads(node, site)
    if onnx_graph.attribute(node, "mode", b"constant") != b"wrap":
        return [node]
    pads = site.constant(node, 1)
    if pads is None:
        raise site.error(node, "has no pads; export the model again")
    chain = Chain(node, site)
    for axis, (size, (before, after)) in enumerate(zip(site.shape(node), pads.reshape(2, -1).T.tolist(), strict=True)):
        inner = np.arange(size)[max(-before, 0) : size - max(-after, 0)]
        if (before, after) != (0, 0):
            chain.then("Gather", np.pad(inner, (max(before, 0), max(after, 0)), mode="wrap"), axis=axis)
    return chain.end()


def _complete_pads(node: NodeProto, site: Site) -> None:
    rank = len(site.shape(node))
    axes, pads = site.constant(node, 3), site.constant(node, 1)
    if axes is None or pads is None:
        raise site.error(node, "has no pads; export the model again")
    full = np.zeros((2, rank), np.int64)
    full[:, axes.ravel() % rank] = pads.reshape(2, -1)
    set_inputs(node, node.input[0], site.store(full.ravel(), f"{node.output[0]}.pads"), *node.input[2:3])


def reduction(node: NodeProto, site: Site) -> list[NodeProto]:
    """Opset 13 and 18 made ``axes`` an input; TVM reads the attribute of earlier opsets well."""
    if len(node.input) > 1:
        axes = site.constant(node, 1)
        set_inputs(node, node.input[0])
        if axes is not None and axes.size:
            set_attributes(node, axes=[int(a) for a in axes.ravel()])
    noop = onnx_graph.attribute(node, "noop_with_empty_axes", 0)
    set_attributes(node, noop_with_empty_axes=None)
    return _reduce_nothing(node, site) if noop and onnx_graph.attribute(node, "axes", None) is None else [node]


def _reduce_nothing(node: NodeProto, site: Site) -> list[NodeProto]:
    """Without axes nothing is summed, but what is done to each element still is."""
    chain = Chain(node, site)
    if node.op_type == "ReduceSumSquare":
        chain.then("Mul", node.input[0])
    elif node.op_type in ("ReduceL1", "ReduceL2"):
        chain.then("Abs")
    elif node.op_type == "ReduceLogSum":
        chain.then("Log")
    return chain.end()


def _input(node: NodeProto, position: int) -> str:
    return node.input[position] if len(node.input) > position else ""


def _label(node: NodeProto) -> str:
    return f"{node.op_type} {(node.name or node.output[0])!r}"
