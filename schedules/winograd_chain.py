"""Sparse Winograd convolutions one after the other, strip by strip; what is done with a block of tiles is in
winograd_steps.py, how images are cut in strip_plan.py.

On wide images a convolution by itself is bound by memory: its images do not fit into a cache. Here all but the first
and the last are there in three rows of tiles only (the line buffers of streaming image processing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import tvm
from tvm import te, tir

from .convolution_buffers import Arguments, ConvolutionBuffers, convolution
from .epilogues import Activation
from .strip_plan import ROWS, StripPlan
from .vector_code import VectorCode
from .winograd_steps import Pixels, Weights, WinogradSteps

_Copy = Callable[[VectorCode, tir.PrimExpr, int], None]
"""(code, x, columns): copies the first so many columns of pixels of the tiles in a vector that begins with tile x."""


def winograd_chain(
    arguments: Arguments[te.Tensor],
    *,
    plan: StripPlan,
    first_values: Sequence[int],
    activations: Sequence[Activation],
    prefetch: bool,
) -> te.Tensor:
    """Convolve, activate, convolve, and so on.

    Args:
        arguments: data (N, C, H, W), float32; BundledRows of formats.pack_winograd and bias (K,) of each layer, one
            after the other; residual of the shape of the result, added to it before the last activation.
        first_values: where the values of each layer begin.
        activations: of each layer.
        prefetch: whether code for the target can fetch ahead.

    Returns:
        (N, K, H, W).
    """
    geometry = plan.geometry
    shape = (geometry.batch, plan.channels[-1], geometry.in_height, geometry.in_width)
    return convolution(
        "chain", shape, arguments, lambda buffers: _Kernel(buffers, plan, first_values, activations, prefetch).emit()
    )


@dataclass(frozen=True)
class _Unit:
    """A part of a strip.

    Attributes:
        image: number of the image.
        left: first tile of the strip; before the image for the first strip, if strips have a halo.
        top, bottom: rows of tiles that it gives, bottom not included.
        firsts: buffer of the first column of pixels of each tile of the strip.
        kept: three rows of the input of each layer.
        inputs, products: of a block.
        line: of one filter of the last layer, the pixels of a block.
    """

    image: tir.PrimExpr
    left: tir.PrimExpr
    top: tir.PrimExpr
    bottom: tir.PrimExpr
    firsts: tir.Buffer
    kept: Sequence[tir.Buffer]
    inputs: tir.Buffer
    products: tir.Buffer
    line: tir.Buffer


class _Kernel:
    """Emits a chain."""

    def __init__(
        self,
        buffers: ConvolutionBuffers,
        plan: StripPlan,
        first_values: Sequence[int],
        activations: Sequence[Activation],
        prefetch: bool,
    ) -> None:
        self.buffers, self.plan, self.activations = buffers, plan, activations
        self.ib = tvm.tir.ir_builder.create()
        self.code = VectorCode(self.ib, plan.lanes, prefetch=prefetch)
        self.steps: list[WinogradSteps] = []
        bundles = rows = biases = 0
        for layer, first_value in zip(plan.layers, first_values, strict=True):
            weights = Weights(buffers, first_value, bundles, rows, biases)
            self.steps.append(WinogradSteps(self.code, layer, weights))
            bundles += layer.positions * layer.bundles + 1
            rows += layer.positions * layer.bundles * layer.blocking.together
            biases += layer.geometry.out_channels

    def emit(self) -> tir.Stmt:
        plan, of_image = self.plan, self.plan.strips * self.plan.parts
        with self.code.loop(plan.units, "unit", "parallel") as i:
            image, strip, part = i // of_image, tir.floormod(i, of_image) // plan.parts, tir.floormod(i, plan.parts)
            self._unit(image, strip, part)
        return self.ib.get()

    def _unit(self, image: tir.PrimExpr, strip: tir.PrimExpr, part: tir.PrimExpr) -> None:
        code, plan = self.code, self.plan
        top = code.let(part * plan.rows)
        unit = _Unit(
            image=image,
            left=code.let(strip * (plan.width - 2 * plan.halo) - plan.halo),
            top=top,
            bottom=code.let(tir.min(top + plan.rows, plan.grid[0])),
            firsts=self._buffer("firsts", plan.width, "int32"),
            kept=[self._buffer(f"kept{i}", plan.kept(i)) for i in range(len(plan.layers))],
            inputs=self._buffer("V", plan.inputs),
            products=self._buffer("M", plan.products),
            line=self._buffer("line", plan.m**2 * plan.layers[-1].tiles),
        )
        with code.loop(plan.width, "x") as x:
            self.ib.emit(tir.BufferStore(unit.firsts, (unit.left + x) * plan.m, [x]))
        for i, kept in enumerate(unit.kept):
            with code.loop(plan.kept(i) // plan.lanes, "x") as x:
                code.store(kept, code.splat(0.0), x * plan.lanes)
        last = len(plan.layers)
        with code.loop(plan.rows + 2 * last, "step") as step:
            row = code.let(top - last + step)
            self._read_row(unit, row)
            for layer in range(last):
                self._layer_row(unit, layer, code.let(row - (layer + 1)))

    def _buffer(self, name: str, elements: int, dtype: str = "float32") -> tir.Buffer:
        return self.ib.allocate(dtype, elements, name=name, scope="global")._buffer

    def _layer_row(self, unit: _Unit, layer: int, row: tir.PrimExpr) -> None:
        """A row of tiles of a layer, if it is one that the part needs."""
        plan, behind = self.plan, len(self.plan.layers) - 1 - layer
        inside = tir.all(row >= 0, row < plan.grid[0])
        needed = tir.all(row >= unit.top - behind, row < unit.bottom + behind)
        with self.ib.if_scope(inside), self.ib.if_scope(needed):
            self._blocks(unit, layer, row)
        if behind:
            with self.ib.if_scope(tir.any(row == -1, row == plan.grid[0])):
                self._zero_row(unit, layer + 1, row)

    def _blocks(self, unit: _Unit, layer: int, row: tir.PrimExpr) -> None:
        whole = self.plan.layers[layer].blocking.vectors
        blocks, rest = divmod(self.plan.vectors, whole)
        if blocks:
            with self.code.loop(blocks, "block") as b:
                self._block(unit, layer, row, b * (whole * self.plan.lanes), whole)
        if rest:
            self._block(unit, layer, row, tir.const(blocks * whole * self.plan.lanes, "int32"), rest)

    def _block(self, unit: _Unit, layer: int, row: tir.PrimExpr, first: tir.PrimExpr, vectors: int) -> None:
        code, plan, steps = self.code, self.plan, self.steps[layer]
        slots = {down: code.let(self._slot(row + down)) for down in (-1, 0, 1)}

        def reader(c: tir.PrimExpr, vector: tir.PrimExpr, reach: int) -> Pixels:
            if layer == 0:
                self._fetch_row(unit, c, row + 2, first + vector)

            def load(i: int, j: int) -> tir.PrimExpr:
                plane = self._plane(c, i % plan.m, j % plan.m)
                return code.load(unit.kept[layer], plane + slots[i // plan.m] + (first + vector + j // plan.m))

            return Pixels(load, range(-reach, plan.m + reach))

        with code.loop(plan.channels[layer], "c") as c:
            steps.transform_input(c, vectors, partial(reader, c), unit.inputs)
        with code.loop(plan.layers[layer].positions, "xi") as xi:
            steps.multiply(xi, vectors, unit.inputs, unit.products)
        with code.loop(plan.channels[layer + 1], "k") as k:
            if layer + 1 < len(plan.layers):
                keep = partial(self._keep, unit, layer, row, first, slots[0], k)
                steps.transform_output(k, vectors, unit.products, lambda vector: partial(keep, vector))
            else:
                line = partial(self._line, unit, vectors)
                steps.transform_output(k, vectors, unit.products, lambda vector: partial(line, vector))
                self._write_row(unit, row, first, vectors, k)

    def _plane(self, channel: tir.PrimExpr, row: int, col: int) -> tir.PrimExpr:
        """Where a plane of what is kept of an image begins."""
        return self.plan.lanes + (channel * self.plan.m**2 + (row * self.plan.m + col)) * self.plan.plane

    def _slot(self, row: tir.PrimExpr) -> tir.PrimExpr:
        """Where, in a plane, a row of tiles is."""
        above = ROWS * (len(self.plan.layers) + 1)  # no row is as far above the image
        return tir.floormod(row + above, ROWS) * self.plan.row_stride

    def _keep(
        self,
        unit: _Unit,
        layer: int,
        row: tir.PrimExpr,
        first: tir.PrimExpr,
        slot: tir.PrimExpr,
        k: tir.PrimExpr,
        vector: tir.PrimExpr,
        i: int,
        j: int,
        value: tir.PrimExpr,
    ) -> None:
        """Pixels for the next layer; zero where they are not of the image."""
        code, geometry, m = self.code, self.plan.geometry, self.plan.m
        value = code.keep(self.activations[layer].emit(code, value))
        at = code.load(unit.firsts, first + vector)
        is_row = row * m + i < geometry.in_height
        end = tir.Select(is_row, tir.const(geometry.in_width - j, "int32"), tir.const(0, "int32"))
        inside = tir.And(at >= code.splat(0, "int32"), at < code.splat(end, "int32"))
        value = tir.Select(inside, value, code.splat(0.0))
        code.store(unit.kept[layer + 1], value, self._plane(k, i, j) + slot + (first + vector))

    def _line(self, unit: _Unit, vectors: int, vector: tir.PrimExpr, i: int, j: int, value: tir.PrimExpr) -> None:
        plane = (i * self.plan.m + j) * vectors * self.plan.lanes
        self.code.store(unit.line, value, plane + vector)

    def _write_row(self, unit: _Unit, row: tir.PrimExpr, first: tir.PrimExpr, vectors: int, k: tir.PrimExpr) -> None:
        """Pixels of a filter out of the line into the image, as far as this strip gives them."""
        code, plan, geometry = self.code, self.plan, self.plan.geometry
        tiles = vectors * plan.lanes
        begin = code.let(tir.max(0, plan.halo - first))
        end = code.let(tir.max(begin, tir.min(tiles, plan.width - plan.halo - first)))
        activation = self.activations[-1]

        def copy(i: int, code: VectorCode, x: tir.PrimExpr, columns: int) -> None:
            at = (unit.image, k, row * plan.m + i, (unit.left + first + x) * plan.m)
            pixels = [code.load(unit.line, (i * plan.m + j) * tiles + x) for j in range(columns)]
            if self.buffers.residual is not None:
                added = code.split_columns(self.buffers.residual, columns, *at)
                pixels = [one + other for one, other in zip(pixels, added, strict=True)]
            pixels = [code.keep(activation.emit(code, one)) for one in pixels]
            code.join_columns(pixels, self.buffers.result, *at)

        for i in range(plan.m):
            with self.ib.if_scope(row * plan.m + i < geometry.in_height):
                self._each_tile(unit.left + first, begin, end, partial(copy, i))

    def _read_row(self, unit: _Unit, row: tir.PrimExpr) -> None:
        """A row of tiles of the data, zero where it is not of the image."""
        plan, geometry = self.plan, self.plan.geometry
        slot = self.code.let(self._slot(row))
        with self.code.loop(plan.channels[0], "c") as c:
            for i in range(plan.m):
                y = row * plan.m + i
                with self.ib.if_scope(tir.all(y >= 0, y < geometry.in_height)):
                    self._read_pixels(unit, c, y, i, slot)
                with self.ib.else_scope():
                    self._zero(unit.kept[0], [self._plane(c, i, j) + slot for j in range(plan.m)], 0, plan.width)

    def _fetch_row(self, unit: _Unit, c: tir.PrimExpr, row: tir.PrimExpr, tile: tir.PrimExpr) -> None:
        """What the next step reads of the data, from a tile of the strip on: it would have to wait for memory."""
        plan, x = self.plan, (unit.left + tile) * self.plan.m
        for i in range(plan.m):
            for piece in range(plan.m):
                self.code.fetch(self.buffers.data, unit.image, c, row * plan.m + i, x + piece * plan.lanes)

    def _read_pixels(self, unit: _Unit, c: tir.PrimExpr, y: tir.PrimExpr, i: int, slot: tir.PrimExpr) -> None:
        plan, kept = self.plan, unit.kept[0]
        starts = [self._plane(c, i, j) + slot for j in range(plan.m)]
        begin = self.code.let(tir.max(0, -unit.left))
        end = self.code.let(tir.max(begin, tir.min(plan.width, plan.grid[1] - unit.left)))

        def copy(code: VectorCode, x: tir.PrimExpr, columns: int) -> None:
            pixels = code.split_columns(self.buffers.data, columns, unit.image, c, y, (unit.left + x) * plan.m)
            for start, one in zip(starts, pixels, strict=False):
                code.store(kept, one, start + x)

        # What is not of the image, in the last tile as well, is zero from the beginning.
        self._each_tile(unit.left, begin, end, copy)

    def _each_tile(self, left: tir.PrimExpr, begin: tir.PrimExpr, end: tir.PrimExpr, copy: _Copy) -> None:
        """Copy the pixels of tiles from `begin` to `end`, counted from tile `left` of the image, that are there."""
        code, plan, one_by_one = self.code, self.plan, VectorCode(self.ib, 1)
        complete, rest = divmod(plan.geometry.in_width, plan.m)
        stop = code.let(tir.max(begin, tir.min(end, complete - left)))
        vectors = code.let((stop - begin) // plan.lanes)
        with code.loop(vectors, "vector") as v:
            copy(code, begin + v * plan.lanes, plan.m)
        after = code.let(begin + vectors * plan.lanes)
        with one_by_one.loop(stop - after, "x") as x:
            copy(one_by_one, after + x, plan.m)
        if rest:
            with self.ib.if_scope(tir.all(stop < end, left + stop == complete)):
                copy(one_by_one, stop, rest)

    def _zero_row(self, unit: _Unit, image: int, row: tir.PrimExpr) -> None:
        slot = self.code.let(self._slot(row))
        with self.code.loop(self.plan.channels[image] * self.plan.m**2, "plane") as plane:
            for x in range(0, self.plan.width, self.plan.lanes):
                start = self.plan.lanes + plane * self.plan.plane + slot + x
                self.code.store(unit.kept[image], self.code.splat(0.0), start)

    def _zero(
        self, buffer: tir.Buffer, starts: Sequence[tir.PrimExpr], begin: tir.PrimExpr | int, end: tir.PrimExpr | int
    ) -> None:
        with self.code.loop(end - begin, "x") as x:
            for start in starts:
                self.ib.emit(tir.BufferStore(buffer, tir.const(0, "float32"), [start + begin + x]))
