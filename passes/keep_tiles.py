"""Keep images in tile layout from one sparse Winograd convolution to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm
from tvm import relay

from ..schedules.constructors import into_tiles, out_of_tiles
from ..schedules.operators import FROM_TILES, TO_TILES
from ..schedules.registration import plain, unpack
from ..schedules.tiles import TileLayout
from .absorb_epilogues import activation_of
from .straight_graphs import Rewriter, is_call, rewrite_straight

# Operators that make zero of zeros, element by element; clip is another, by its bounds.
_KEEP_ZEROS = ("nn.relu", "nn.leaky_relu", "tanh", "add", "subtract", "multiply", "maximum", "minimum")


@tvm.transform.module_pass(opt_level=0, name="KeepTiles")
class KeepTiles:
    """Take away conversions out of tile layout and into the same again, through what works in either layout.

    A ``@main`` with control flow or functions inside is handed back unchanged.
    """

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite_straight(mod, (FROM_TILES,), _Rewriter)


_Tiles = tuple[relay.Expr, TileLayout]


class _Rewriter(Rewriter):
    def __init__(self, nodes: list[relay.Expr]) -> None:
        # Images that are there in tile layout: they get a value in NCHW only if somebody needs it.
        self.tiles: dict[relay.Expr, _Tiles] = {}
        self.converted: dict[tuple[relay.Expr, TileLayout, tuple[int, int]], relay.Expr] = {}
        super().__init__(nodes)

    def late_value(self, node: relay.Expr) -> relay.Expr:
        return out_of_tiles(*self.tiles[node]) if node in self.tiles else super().late_value(node)

    def call(self, call: relay.Call) -> relay.Expr | None:
        if is_call(call, TO_TILES):
            return self._in_tiles(call.args[0], unpack(TileLayout, call.attrs), plain(call.attrs["offset"]))
        tiles = self._from_tiles(call) or self._elementwise(call) or self._concatenation(call)
        if tiles is None:
            return super().call(call)
        self.tiles[call] = tiles
        return None

    def _in_tiles(self, node: relay.Expr, layout: TileLayout, offset: tuple[int, int]) -> relay.Expr:
        """An image in this very layout, converted if it is not."""
        if offset == (0, 0) and node in self.tiles and self.tiles[node][1] == layout:
            return self.tiles[node][0]
        key = (node, layout, offset)
        if key not in self.converted:
            shape = [int(size) for size in node.checked_type.shape]
            self.converted[key] = into_tiles(self.value(node), shape, layout, offset)
        return self.converted[key]

    def _from_tiles(self, call: relay.Call) -> _Tiles | None:
        return (self.value(call.args[0]), unpack(TileLayout, call.attrs)) if is_call(call, FROM_TILES) else None

    def _elementwise(self, call: relay.Call) -> _Tiles | None:
        activation = activation_of(call)
        keeps_zeros = activation is not None and activation.low <= 0 <= activation.high
        if not (keeps_zeros or is_call(call, *_KEEP_ZEROS)):
            return None
        return self._on_tiles(call.args, lambda tiles: relay.Call(call.op, tiles, call.attrs))

    def _concatenation(self, call: relay.Call) -> _Tiles | None:
        if not is_call(call, "concatenate") or int(call.attrs.axis) != 1 or not isinstance(call.args[0], relay.Tuple):
            return None
        return self._on_tiles(call.args[0].fields, lambda tiles: relay.concatenate(tiles, axis=1))

    def _on_tiles(self, images: Sequence[relay.Expr], make: Callable[[list[relay.Expr]], relay.Expr]) -> _Tiles | None:
        """The same on tiles, if all are there in one layout."""
        if not all(image in self.tiles for image in images):
            return None
        tiles, layouts = zip(*(self.tiles[image] for image in images), strict=True)
        return (make(list(tiles)), layouts[0]) if len(set(layouts)) == 1 else None
