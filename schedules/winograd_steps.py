"""The three steps of a sparse Winograd convolution, for some vectors of tiles: transform the input, multiply by the
sparse filters, transform back.

For each of the n x n positions xi of a tile the filters are a sparse K x C matrix; the products are
``M[xi, k, t] = sum over e of values[e] * V[xi, indices[e], t]`` with tiles t as vector lanes. Matrices come from
winograd.py (Winograd 1980; Lavin and Gray, arXiv 1509.09308); pruning in that domain is Liu et al., arXiv 1802.06367.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from tvm import tir

from .convolution_buffers import ConvolutionBuffers
from .products import Operands, Products
from .vector_code import LINE, VectorCode
from .winograd import transform
from .winograd_plan import WinogradPlan

Load = Callable[[int, int], tir.PrimExpr]
"""(row, column) -> pixels of a vector of tiles; rows and columns are counted from a tile's first. In Pixels: (row,
number) -> one of the vectors that columns are made of."""


@dataclass(frozen=True)
class Pixels:
    """Those of a vector of tiles, and around them.

    Attributes:
        load: (row, number) -> a vector; rows are counted from a tile's first.
        loaded: the numbers of the vectors of a row: its columns, or what columns can be made of.
        columns: of a row of what was computed of vectors loaded, the columns.
    """

    load: Load
    loaded: range
    columns: Callable[[Sequence[tir.PrimExpr]], Sequence[tir.PrimExpr]] = list


Own = Callable[[tir.PrimExpr], Load]
"""(first tile of a vector) -> how the pixels of its tiles are read, and no others."""
Store = Callable[[int, int, tir.PrimExpr], None]
"""(row, column, pixels of a vector of tiles)."""
Reader = Callable[[tir.PrimExpr, int], Pixels]
"""(first tile of a vector, pixels beyond its tiles that are wanted) -> how its pixels are read."""
Writer = Callable[[tir.PrimExpr], Store]
"""(first tile of a vector) -> how its pixels are written."""


_MOST_LINES = 64
"""Fetched ahead by the code of one bundle."""

_UNROLLED = 4
"""Non-zeros of each row that a pass of the loop takes at most: with four rows, a line of weights."""

_VALUES_AHEAD = 256
"""Non-zeros from the one that is used to the one that is fetched: in a network weights come from beyond L2."""


class WinogradSteps:
    """Emits the steps.

    Args:
        plan: where its layout has its tiles does not matter here.
    """

    def __init__(self, code: VectorCode, plan: WinogradPlan, buffers: ConvolutionBuffers) -> None:
        self.code, self.plan, self.buffers = code, plan, buffers
        self.matrices = transform(plan.layout.m, plan.geometry.kernel[0])
        self.reach = (plan.geometry.kernel[0] - 1) // 2
        self.products = Products(code, buffers, plan.blocking.together, _UNROLLED, _VALUES_AHEAD)

    def clear_fill(self, inputs: tir.Buffer) -> None:
        """The channel of zeros behind the others."""
        plan, code = self.plan, self.code
        behind = plan.geometry.in_channels * plan.tiles
        with code.loop(plan.positions, "position") as position:
            for t in range(plan.blocking.vectors):
                place = behind + position * plan.input_stride + t * code.lanes
                code.store(inputs, code.splat(0.0), place)

    def transform_input(self, c: tir.PrimExpr, vectors: int, reader: Reader, inputs: tir.Buffer) -> None:
        """``V = BT d B`` for one channel."""
        code, n = self.code, self.matrices.n
        code.align_stack()
        with code.loop(vectors, "t") as t:
            vector = code.let(t * code.lanes)
            target = code.let(c * self.plan.tiles + vector)
            pixels = reader(vector, self.reach)
            columns = [code.product(self.matrices.BT, partial(self._pixel, pixels, v)) for v in pixels.loaded]
            for u in range(n):
                of_tiles = pixels.columns([column[u] for column in columns])
                row = code.product(self.matrices.BT, of_tiles.__getitem__)
                for v in range(n):
                    if u * n + v not in self.plan.idle:
                        code.store(inputs, row[v], (u * n + v) * self.plan.input_stride + target)

    def _pixel(self, pixels: Pixels, v: int, u: int) -> tir.PrimExpr:
        return pixels.load(u - self.reach, v)

    def multiply(
        self,
        xi: tir.PrimExpr,
        following: tir.PrimExpr,
        vectors: int,
        inputs: tir.Buffer,
        products: tir.Buffer,
        meanwhile: Callable[[tir.PrimExpr], None],
    ) -> None:
        """``M = U V`` at one position: sums in registers, non-zeros outside, vectors inside.

        Args:
            following: the position that comes next.
            meanwhile: emits what else is to be done for a bundle.
        """
        code, plan, together = self.code, self.plan, self.plan.blocking.together
        buffers = self.buffers
        assert buffers.filters is not None
        # In 64 bits, so that what is added to it becomes part of an address.
        first = code.let(tir.Cast("int64", xi * plan.input_stride))
        operands = Operands(inputs, first, [t * code.lanes for t in range(vectors)], plan.index_unit)
        target = code.let(xi * plan.product_stride)
        with code.loop(plan.bundles, "bundle") as within:
            bundle = code.let(xi * plan.bundles + within)
            sums = [code.array(vectors, "sums") for _ in range(together)]
            for one in chain(*sums):
                code.set(one, code.splat(0.0))
            self._fetch_next(inputs, following * plan.input_stride, within)
            meanwhile(within)
            self.products.add(sums, bundle, operands)
            for r in range(together):
                filter_ = buffers.filters[bundle * together + r]
                row = code.let(target + filter_ * plan.tiles)
                for t, one in enumerate(sums[r]):
                    code.store(products, one, row + t * code.lanes)

    def _fetch_next(self, inputs: tir.Buffer, base: tir.PrimExpr, bundle: tir.PrimExpr) -> None:
        """Of the transformed input of the next position, the part of one bundle: before it is needed."""
        lines = -(-self.plan.input_stride // (self.plan.bundles * LINE))
        for line in range(min(lines, _MOST_LINES)):
            self.code.fetch(inputs, base + (bundle * lines + line) * LINE)

    def transform_output(self, k: tir.PrimExpr, vectors: int, products: tir.Buffer, writer: Writer) -> None:
        """``Y = AT M A`` and the bias, for one filter."""
        code, n, m = self.code, self.matrices.n, self.plan.layout.m
        code.align_stack()
        bias = code.keep(code.splat(self.buffers.bias[k]))
        with code.loop(vectors, "t") as t:
            vector = code.let(t * code.lanes)
            source, store = code.let(k * self.plan.tiles + vector), writer(vector)

            def at_position(v: int, u: int) -> tir.PrimExpr:
                return code.load(products, (u * n + v) * self.plan.product_stride + source)

            columns = {v: self._back(self._busy_rows(v), partial(at_position, v)) for v in self._busy_columns}
            for i in range(m):
                row = self._back(self._busy_columns, partial(_entry, columns, i))
                for j in range(m):
                    store(i, j, row[j] + bias)

    def _back(self, places: Sequence[int], operand: Callable[[int], tir.PrimExpr]) -> list[tir.PrimExpr]:
        """``AT`` times a column or a row of M that is zero but in these places."""
        matrix = tuple(tuple(row[place] for place in places) for row in self.matrices.AT)
        return self.code.product(matrix, lambda number: operand(places[number]))

    def _busy_rows(self, v: int) -> list[int]:
        """Of a column of M, those that are not idle."""
        n = self.matrices.n
        return [u for u in range(n) if u * n + v not in self.plan.idle]

    @property
    def _busy_columns(self) -> list[int]:
        return [v for v in range(self.matrices.n) if self._busy_rows(v)]


def _entry(columns: Mapping[int, Sequence[tir.PrimExpr]], row: int, column: int) -> tir.PrimExpr:
    return columns[column][row]
