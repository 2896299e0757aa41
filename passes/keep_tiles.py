"""Keep images in tile layout from one sparse Winograd convolution to the next, and give those what follows them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay

from ..schedules.epilogues import RELU, Activation
from ..schedules.operators import FROM_TILES, TO_TILES, WINOGRAD, WINOGRAD_ADD, into_tiles, out_of_tiles
from ..schedules.registration import call as relay_call
from ..schedules.registration import plain, unpack
from ..schedules.tiles import TileLayout
from .convolutions import MAIN

# Operators that make zero of zeros, element by element; clip is another, by its bounds.
_KEEP_ZEROS = ("nn.relu", "nn.leaky_relu", "tanh", "add", "subtract", "multiply", "maximum", "minimum")


@tvm.transform.module_pass(opt_level=0, name="KeepTiles")
class KeepTiles:
    """Take away conversions out of tile layout and into the same again, through what works in either layout.

    What a Winograd operator can do to its result itself (bias, residual, activation) becomes part of it. A ``@main``
    with control flow or functions inside is handed back unchanged.
    """

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        mod = relay.transform.InferType()(mod)
        function = mod[MAIN]
        nodes: list[relay.Expr] = []
        relay.analysis.post_order_visit(function.body, nodes.append)
        if not any(_is_call(node, FROM_TILES) for node in nodes) or not all(_is_straight(node) for node in nodes):
            return mod
        body = _Rewriter(nodes).value(function.body)
        mod = mod.clone()
        mod[MAIN] = relay.Function(function.params, body, function.ret_type, function.type_params, function.attrs)
        return relay.transform.InferType()(mod)


def _is_straight(node: relay.Expr) -> bool:
    if isinstance(node, relay.Call):
        return isinstance(node.op, tvm.ir.Op)
    return isinstance(node, relay.Var | relay.Constant | relay.Tuple | relay.TupleGetItem | tvm.ir.Op)


def _is_call(node: relay.Expr, *names: str) -> bool:
    return isinstance(node, relay.Call) and isinstance(node.op, tvm.ir.Op) and node.op.name in names


class _Rewriter:
    """Gives every node of a graph, operands first, its new value."""

    def __init__(self, nodes: list[relay.Expr]) -> None:
        self.uses = Counter(operand for node in nodes for operand in _operands(node))
        self.values: dict[relay.Expr, relay.Expr] = {}
        # Of images that are there in tile layout: they get a value in NCHW only if somebody needs it.
        self.tiles: dict[relay.Expr, tuple[relay.Expr, TileLayout]] = {}
        # Those of them whose Winograd operator has no other reader, nor an activation yet.
        self.open: set[relay.Expr] = set()
        self.converted: dict[tuple[relay.Expr, TileLayout, tuple[int, int]], relay.Expr] = {}
        for node in nodes:
            self._visit(node)

    def value(self, node: relay.Expr) -> relay.Expr:
        """In NCHW if it is an image."""
        if node not in self.values:
            if isinstance(node, relay.Tuple):
                self.values[node] = relay.Tuple([self.value(field) for field in node.fields])
            else:
                self.values[node] = out_of_tiles(*self.tiles[node])
        return self.values[node]

    def in_tiles(self, node: relay.Expr, layout: TileLayout, offset: tuple[int, int] = (0, 0)) -> relay.Expr:
        """An image in this very layout, converted if it is not."""
        if offset == (0, 0) and node in self.tiles and self.tiles[node][1] == layout:
            return self.tiles[node][0]
        key = (node, layout, offset)
        if key not in self.converted:
            shape = [int(size) for size in node.checked_type.shape]
            self.converted[key] = into_tiles(self.value(node), shape, layout, offset)
        return self.converted[key]

    def _visit(self, node: relay.Expr) -> None:
        if isinstance(node, relay.Tuple):
            return
        if isinstance(node, relay.TupleGetItem):
            self.values[node] = relay.TupleGetItem(self.value(node.tuple_value), node.index)
        elif not isinstance(node, relay.Call):
            self.values[node] = node
        elif _is_call(node, TO_TILES):
            layout = unpack(TileLayout, node.attrs)
            self.values[node] = self.in_tiles(node.args[0], layout, plain(node.attrs["offset"]))
        elif not self._visit_image(node):
            arguments = [self.value(argument) for argument in node.args]
            self.values[node] = relay.Call(node.op, arguments, node.attrs, node.type_args, node.span)

    def _visit_image(self, call: relay.Call) -> bool:
        """Enter the call among the images in tiles, if it can be one."""
        absorbed = self._bias(call) or self._residual(call) or self._activation(call)
        found = absorbed or self._from_tiles(call) or self._elementwise(call) or self._concatenation(call)
        if found is None:
            return False
        self.tiles[call] = found
        if _has_no_activation(found[0]) and (absorbed or self.uses[call.args[0]] == 1):
            self.open.add(call)
        return True

    def _absorbs(self, node: relay.Expr) -> bool:
        """Whether what is done to this image can be done by the Winograd operator that makes it."""
        return node in self.open and self.uses[node] == 1

    def _from_tiles(self, call: relay.Call) -> tuple[relay.Expr, TileLayout] | None:
        if not _is_call(call, FROM_TILES):
            return None
        return self.value(call.args[0]), unpack(TileLayout, call.attrs)

    def _bias(self, call: relay.Call) -> tuple[relay.Expr, TileLayout] | None:
        for image, other in _either_way(call, "add", "nn.bias_add"):
            if not self._absorbs(image):
                continue
            convolution, layout = self.tiles[image]
            bias = convolution.args[4].data.numpy()
            added = _by_channel(call, other, len(bias))
            if added is not None:
                arguments = [*convolution.args[:4], relay.const(bias + added), *convolution.args[5:]]
                return relay.Call(convolution.op, arguments, convolution.attrs), layout
        return None

    def _residual(self, call: relay.Call) -> tuple[relay.Expr, TileLayout] | None:
        for image, other in _either_way(call, "add"):
            if not self._absorbs(image) or image.checked_type != other.checked_type:
                continue
            convolution, layout = self.tiles[image]
            if _is_call(convolution, WINOGRAD):
                attributes = {name: convolution.attrs[name] for name in convolution.attrs.keys()}  # noqa: SIM118
                arguments = [*convolution.args, self.in_tiles(other, layout)]
                return relay_call(WINOGRAD_ADD, arguments, **attributes), layout
        return None

    def _activation(self, call: relay.Call) -> tuple[relay.Expr, TileLayout] | None:
        activation = _activation_of(call)
        if activation is None or not self._absorbs(call.args[0]):
            return None
        convolution, layout = self.tiles[call.args[0]]
        attributes = {name: convolution.attrs[name] for name in convolution.attrs.keys()}  # noqa: SIM118
        attributes |= asdict(activation)
        return relay_call(convolution.op.name, convolution.args, **attributes), layout

    def _elementwise(self, call: relay.Call) -> tuple[relay.Expr, TileLayout] | None:
        activation = _activation_of(call)
        keeps_zeros = activation is not None and activation.low <= 0 <= activation.high
        if not (keeps_zeros or _is_call(call, *_KEEP_ZEROS)):
            return None
        return self._on_tiles(call.args, lambda tiles: relay.Call(call.op, tiles, call.attrs))

    def _concatenation(self, call: relay.Call) -> tuple[relay.Expr, TileLayout] | None:
        if not _is_call(call, "concatenate") or int(call.attrs.axis) != 1 or not isinstance(call.args[0], relay.Tuple):
            return None
        return self._on_tiles(call.args[0].fields, lambda tiles: relay.concatenate(tiles, axis=1))

    def _on_tiles(self, images: Any, make: Any) -> tuple[relay.Expr, TileLayout] | None:
        """The same on tiles, if all are there in one layout."""
        if not all(image in self.tiles for image in images):
            return None
        tiles, layouts = zip(*(self.tiles[image] for image in images), strict=True)
        return (make(list(tiles)), layouts[0]) if len(set(layouts)) == 1 else None


def _operands(node: relay.Expr) -> list[relay.Expr]:
    if isinstance(node, relay.Call):
        return list(node.args)
    if isinstance(node, relay.Tuple):
        return list(node.fields)
    return [node.tuple_value] if isinstance(node, relay.TupleGetItem) else []


def _has_no_activation(tiles: relay.Expr) -> bool:
    """Whether this is the result of a Winograd operator that does not activate."""
    return _is_call(tiles, WINOGRAD, WINOGRAD_ADD) and not unpack(Activation, tiles.attrs).activation


def _either_way(call: relay.Call, *names: str) -> list[tuple[relay.Expr, relay.Expr]]:
    """The operands of one of these operators, in both orders."""
    if not _is_call(call, *names):
        return []
    return [(call.args[0], call.args[1]), (call.args[1], call.args[0])]


def _by_channel(call: relay.Call, constant: relay.Expr, channels: int) -> NDArray[np.float32] | None:
    """The constant that is added to each channel, if it is one number for all its pixels."""
    if not isinstance(constant, relay.Constant):
        return None
    value = constant.data.numpy()
    if call.op.name == "nn.bias_add":
        return value if int(call.attrs.axis) == 1 else None
    shape = (1,) * (4 - value.ndim) + value.shape
    if shape not in ((1, channels, 1, 1), (1, 1, 1, 1)):
        return None
    return np.broadcast_to(value.reshape(-1), channels)


def _activation_of(call: relay.Call) -> Activation | None:
    if _is_call(call, "nn.relu"):
        return RELU
    if _is_call(call, "clip"):
        return Activation("clip", float(call.attrs.a_min), float(call.attrs.a_max))
    if _is_call(call, "nn.leaky_relu"):
        return Activation("leaky_relu", float(call.attrs.alpha))
    return None
