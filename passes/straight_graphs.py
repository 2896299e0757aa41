"""Graphs without control flow, which a pass can rewrite node by node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import tvm
from tvm import relay

from .convolutions import MAIN


def rewrite_straight(
    mod: tvm.IRModule, names: tuple[str, ...], rewriter: Callable[[list[relay.Expr]], Rewriter]
) -> tvm.IRModule:
    """``@main`` rewritten, if it calls one of these operators and has neither control flow nor functions inside."""
    mod = relay.transform.InferType()(mod)
    function = mod[MAIN]
    nodes: list[relay.Expr] = []
    relay.analysis.post_order_visit(function.body, nodes.append)
    if not any(is_call(node, *names) for node in nodes) or not all(_is_straight(node) for node in nodes):
        return mod
    body = rewriter(nodes).value(function.body)
    mod = mod.clone()
    mod[MAIN] = relay.Function(function.params, body, function.ret_type, function.type_params, function.attrs)
    return relay.transform.InferType()(mod)


class Rewriter:
    """Gives every node of a graph, operands first, its new value; by itself the same again.

    It does not recurse, so that depth is no limit.

    Attributes:
        uses: how many operands each node is.
    """

    def __init__(self, nodes: list[relay.Expr]) -> None:
        self.uses = Counter(operand for node in nodes for operand in operands(node))
        self._values: dict[relay.Expr, relay.Expr] = {}
        for node in nodes:
            if not isinstance(node, relay.Tuple):  # which its readers make, of what they need
                self._visit(node)

    def value(self, node: relay.Expr) -> relay.Expr:
        """The new value of a node visited."""
        if node not in self._values:
            self._values[node] = self.late_value(node)
        return self._values[node]

    def call(self, call: relay.Call) -> relay.Expr | None:
        """The new value of a call; None if it is made when it is asked for."""
        return rebuilt(call, [self.value(argument) for argument in call.args])

    def late_value(self, node: relay.Expr) -> relay.Expr:
        """Of what has no value when it is asked for."""
        return relay.Tuple([self.value(field) for field in node.fields])

    def _visit(self, node: relay.Expr) -> None:
        value: relay.Expr | None = node
        if isinstance(node, relay.TupleGetItem):
            value = relay.TupleGetItem(self.value(node.tuple_value), node.index)
        elif isinstance(node, relay.Call):
            value = self.call(node)
        if value is not None:
            self._values[node] = value


def is_call(node: relay.Expr, *names: str) -> bool:
    """Whether this calls one of these operators."""
    return isinstance(node, relay.Call) and isinstance(node.op, tvm.ir.Op) and node.op.name in names


def rebuilt(call: relay.Call, arguments: list[relay.Expr]) -> relay.Call:
    """The same call of other arguments."""
    return relay.Call(call.op, arguments, call.attrs, call.type_args, call.span)


def operands(node: relay.Expr) -> list[relay.Expr]:
    """What a node is computed from, weights included."""
    if isinstance(node, relay.Call):
        return list(node.args)
    if isinstance(node, relay.Tuple):
        return list(node.fields)
    return [node.tuple_value] if isinstance(node, relay.TupleGetItem) else []


def _is_straight(node: relay.Expr) -> bool:
    if isinstance(node, relay.Call):
        return isinstance(node.op, tvm.ir.Op)
    return isinstance(node, relay.Var | relay.Constant | relay.Tuple | relay.TupleGetItem | tvm.ir.Op)
