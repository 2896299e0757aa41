"""Where the convolutions of a module are; a fully-connected layer counts as one, of a single pixel."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relay

MAIN = "main"

_FULLY_CONNECTED = {
    "nn.dense",
    "nn.contrib_dense_pack",
    "nn.matmul",
    "nn.sparse_dense",
    "qnn.dense",
    "jointsparse.dense_sparse",
}


@dataclass(frozen=True)
class Convolution:
    """A call of a convolution operator.

    Attributes:
        call: the call. op: its operator's name.
        elsewhere: why the passes must not touch it where it is; None in the plain body of ``@main``.
    """

    call: relay.Call
    op: str
    elsewhere: str | None


def find_convolutions(mod: tvm.IRModule) -> list[Convolution]:
    """Every call of a convolution operator, those of this project included: ``@main`` first, in order of execution."""
    names = sorted((var.name_hint for var in mod.get_global_vars()), key=lambda name: (name != MAIN, name))
    found = []
    for name in names:
        if isinstance(mod[name], relay.Function):
            found += _in_function(name, mod[name])
    return found


def _in_function(name: str, function: relay.Function) -> list[Convolution]:
    enclosed = _enclosed_calls(function)
    where = _why_not_function(name, function)
    return [
        Convolution(call, call.op.name, where or ("inside a nested function" if call in enclosed else None))
        for call in _calls(function.body)
        if is_convolution(call)
    ]


def _why_not_function(name: str, function: relay.Function) -> str | None:
    attributes = function.attrs or {}
    if "Compiler" in attributes:
        return f"function @{name} is compiled by {attributes['Compiler']}"
    if name != MAIN:
        return f"in function @{name}: only @{MAIN} is rewritten"
    return None


def is_convolution(call: relay.Call) -> bool:
    """Whether this calls a convolution, of whatever dimension, data type or layout, or a fully-connected layer."""
    if not isinstance(call.op, tvm.ir.Op):
        return False
    name = call.op.name
    return name in _FULLY_CONNECTED or ("conv" in name and not name.endswith(("weight_transform", "backward_weight")))


def weight_parameter(call: relay.Call) -> str | None:
    """Name of the parameter that a convolution takes as its weight directly; of a fully-connected layer, also
    transposed."""
    if len(call.args) < 2:
        return None
    weight, transposed = untransposed(call.args[1])
    if not isinstance(weight, relay.Var) or (transposed and call.op.name != "nn.dense"):
        return None
    return weight.name_hint


def untransposed(matrix: relay.Expr) -> tuple[relay.Expr, bool]:
    """What this is the transpose of and True, or itself and False."""
    if not isinstance(matrix, relay.Call) or matrix.op != relay.op.get("transpose"):
        return matrix, False
    axes = [int(axis) for axis in matrix.attrs.axes] if matrix.attrs.axes is not None else [1, 0]
    return (matrix.args[0], True) if axes == [1, 0] else (matrix, False)


def _enclosed_calls(function: relay.Function) -> set[relay.Call]:
    """The calls inside functions defined in the body: partitions of other compilers, closures, fused groups."""
    inner: list[relay.Function] = []
    relay.analysis.post_order_visit(
        function.body, lambda node: inner.append(node) if isinstance(node, relay.Function) else None
    )
    return {call for nested in inner for call in _calls(nested.body)}


def _calls(expression: relay.Expr) -> list[relay.Call]:
    calls: list[relay.Call] = []
    relay.analysis.post_order_visit(
        expression, lambda node: calls.append(node) if isinstance(node, relay.Call) else None
    )
    return calls
